"""report.html of a sweep: its trials as a table and in parallel coordinates, on one page without scripts."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.report.html import render_page
from orchestrator.report.page import REPORT
from orchestrator.report.plots import INK, MUTED, SERIES, STYLE, as_svg
from orchestrator.report.table import Table, text
from orchestrator.sweep.record import SweepRecord, Trial
from trainers.storage import Folder

TEMPLATE = Path(__file__).parent / "sweep.html"
LOG_SPAN = 20
"""Numbers above 0 whose largest is so many times the smallest stand on a logarithmic axis."""
MOST_TICKS = 8
ERROR_CHARS = 60
"""Of a failure in the terminal; the page and the run's own result have it whole."""


def trial_table(record: SweepRecord, error_chars: int | None = None) -> Table:
    """A line a trial, the best first; so many characters of why it failed. copied: which trial, at which step."""
    rows = []
    for trial in record.ranked():
        best = trial.best(record.mode) or (None, None)
        why = trial.error.splitlines()[0] if trial.error else ""
        why = why if error_chars is None else textwrap.shorten(why, error_chars, placeholder=" ...")
        state = f"failed: {why}" if trial.error else trial.state
        taken = f"{trial.step:,}/{trial.steps:,}" if trial.steps else None
        values = (trial.values.get(name) for name in record.fields)
        copied = f"{trial.line[-1].trial} at {trial.line[-1].step:,}" if trial.line else None
        came = (copied,) if record.method == "population" else ()
        ending = "best" if trial.number == record.best else state
        rows.append((trial.number, *values, *came, best[1], best[0], taken, ending))
    kinds = ["failure" if trial.error else "best" if trial.number == record.best else "" for trial in record.ranked()]
    names = (name.removeprefix("train.") for name in record.fields)
    came_from = ("copied",) if record.method == "population" else ()
    columns = ("trial", *names, *came_from, record.metric, "at step", "steps", "")
    return Table(f"trials, by {record.metric}", columns, rows, kinds)


def line_table(record: SweepRecord) -> Table | None:
    """A line a stretch of steps that had the same values, for trials that copied another; None where none did."""
    rows = []
    for trial in record.ranked():
        first = 1
        for stretch in trial.line:
            values = (stretch.values.get(name) for name in record.fields)
            rows.append((trial.number, f"{first:,} to {stretch.step:,}", *values, stretch.run))
            first = stretch.step + 1
        if trial.line:
            values = (trial.values.get(name) for name in record.fields)
            rows.append((trial.number, f"{first:,} to {trial.step:,}", *values, trial.run))
    names = (name.removeprefix("train.") for name in record.fields)
    return Table("values by step", ("trial", "steps", *names, "run"), rows) if rows else None


def write_page(folder: Folder, record: SweepRecord) -> None:
    """Write the page into the sweep's folder, over an earlier one."""
    from markupsafe import Markup

    plot, table = Markup(draw_parallel(record)), trial_table(record)
    runs = {text(trial.number): trial.run for trial in record.trials}
    steps = sum(trial.step for trial in record.trials), sum(trial.steps for trial in record.trials)
    told = render_page(TEMPLATE, record=record, table=table, plot=plot, runs=runs, steps=steps, line=line_table(record))
    folder.write_bytes(REPORT, told.encode())


def draw_parallel(record: SweepRecord) -> str:
    """An axis a field and one for the metric, a line a trial that was evaluated: the darker the better."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    trials = [trial for trial in reversed(record.ranked()) if trial.best(record.mode)]
    columns = [[trial.values[name] for trial in trials] for name in record.fields]
    columns.append([best[1] for trial in trials if (best := trial.best(record.mode))])
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(max(5.4, 1.6 * len(columns)), 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        places = [_axis(axes, number, column) for number, column in enumerate(columns)]
        for rank, line in enumerate(zip(*places, strict=True), 1):
            if rank < len(trials):
                axes.plot(line, color=SERIES[0], linewidth=1.4, alpha=0.15 + 0.7 * rank / len(trials))
            else:
                axes.plot(line, color=SERIES[1], linewidth=2.8)
        axes.set_xticks(range(len(columns)), [*record.fields, record.metric])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(columns) - 0.7)
        axes.set_title(f"{len(trials)} trials; the best in orange")
        return as_svg(figure, f"Parallel coordinates: {_told(record, trials)}")


def _told(record: SweepRecord, trials: Sequence[Trial]) -> str:
    """The plot for those who cannot see it."""
    parts = []
    for trial in reversed(trials):
        values = " ".join(f"{name}={value}" for name, value in trial.values.items())
        best = trial.best(record.mode)
        parts.append(f"trial {trial.number} {values} {record.metric} {best[1]:.4g}" if best else "")
    return "; ".join(parts) or "no trial was evaluated"


def _axis(axes: Any, x: int, values: Sequence[Any]) -> list[float]:
    """Draw a vertical axis with its ticks, and give the height of each value on it, 0 to 1."""
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=1, zorder=0)
    ticks, heights = scale(values)
    for name, height in ticks:
        axes.annotate(name, (x, height), (4, 1), textcoords="offset points", va="bottom", fontsize=8, color=INK)
    return heights


def scale(values: Sequence[Any]) -> tuple[list[tuple[str, float]], list[float]]:
    """Ticks and heights from 0 to 1: numbers in proportion, by magnitude where they span several; others in order."""
    if not values:
        return [], []
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        names = sorted({str(value) for value in values})
        heights = {name: number / max(len(names) - 1, 1) for number, name in enumerate(names)}
        return list(heights.items()), [heights[str(value)] for value in values]
    low, high = min(values), max(values)
    measure = math.log if low > 0 and high / low >= LOG_SPAN else float
    bottom, span = measure(low), measure(high) - measure(low)

    def height(value: float) -> float:
        return (measure(value) - bottom) / span if span else 0.5

    distinct = sorted(set(values))
    shown = distinct if len(distinct) <= MOST_TICKS else [low, high]
    return [(f"{value:.4g}", height(value)) for value in shown], [height(value) for value in values]
