"""Curves of a run as inline SVG that takes its colours from the page, so that it reads in light and dark alike.

Knows events and evaluations; not the page. matplotlib draws in stand-in colours that are swapped for CSS variables.
"""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from orchestrator.report.details import Details
from trainers.run.events import Event, StartEvent, StepEvent, steps_of
from trainers.run.folder import Evaluation
from trainers.tasks import SET

SIZE_INCHES = (5.4, 2.7)
LEGEND_LINE_INCHES = 0.18
MOST_POINTS = 1500
SMOOTHING = 0.8
"""Weight of the past in the exponential mean drawn over noisy curves."""

INK, MUTED = "#010203", "#040506"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(1, 7))
CSS = {INK: "currentColor", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}
UNBOUNDED = ("loss", "perplexity")
"""Metrics that do not share an axis with those between 0 and 1."""
LINES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (6, 2, 1, 2, 1, 2)), (0, (3, 6)))
"""Of metrics that are drawn alike otherwise."""
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": MUTED,
    "grid.alpha": 0.2,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Points = tuple[list[float], list[float]]


def draw_curves(
    events: Sequence[Event], evaluations: Sequence[Evaluation], best_step: int | None, metric: str, details: Details
) -> list[str]:
    """All plots that there is data for, as SVG elements; the deciding metric first.

    Args:
        metric: the one that decides.
        details: what it is measured against.
    """
    import matplotlib as mpl

    steps, restarts = steps_of(events), _restarts(events)
    done = sorted((one for one in evaluations if one.status == "done"), key=lambda one: one.step)
    with mpl.rc_context(STYLE):
        drawn = [
            _deciding(done, restarts, best_step, metric, details),
            _loss(steps, done, restarts, best_step),
            _single(steps, "learning_rate", "Learning rate", restarts, smooth=False),
            _single(steps, "grad_norm", "Gradient norm", restarts, smooth=True),
            _single(steps, "tokens_per_s", "Tokens per second", restarts, smooth=True),
            _single(steps, "memory_gib", "Peak memory of the first rank, GiB", restarts, smooth=False),
        ]
    return [svg for svg in drawn if svg]


def _restarts(events: Sequence[Event]) -> list[float]:
    """Steps at which training was taken up again."""
    starts = [event.step for event in events if isinstance(event, StartEvent)]
    return [float(step) for step in starts[1:]]


def _series(events: Sequence[StepEvent], name: str) -> Points:
    chosen = [event for event in events if _finite(getattr(event, name))]
    chosen = chosen[:: -(-len(chosen) // MOST_POINTS) or 1]
    return [float(event.step) for event in chosen], [float(getattr(event, name)) for event in chosen]


def _metric_series(done: Sequence[Evaluation], name: str) -> Points:
    chosen = [one for one in done if _finite(one.metrics.get(name))]
    return [float(one.step) for one in chosen], [one.metrics[name] for one in chosen]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _loss(
    steps: Sequence[StepEvent], evaluations: Sequence[Evaluation], restarts: list[float], best_step: int | None
) -> str | None:
    train, evaluated = _series(steps, "loss"), _metric_series(evaluations, "loss")
    if not train[0] and not evaluated[0]:
        return None
    figure, axes = _axes("Loss", restarts)
    _noisy(axes, train, SERIES[0], "training", smooth=True)
    axes.plot(*evaluated, color=SERIES[1], marker="o", markersize=4, linewidth=1.6, label="evaluation")
    _mark_best(axes, best_step)
    axes.legend(loc="best")
    ends = "".join(f"; {name} from {line[1][0]:.4g} to {line[1][-1]:.4g}"
                   for name, line in (("training", train), ("evaluation", evaluated)) if line[1])  # fmt: skip
    return as_svg(figure, f"Loss by step{ends}")


def _deciding(
    evaluations: Sequence[Evaluation], restarts: list[float], best_step: int | None, metric: str, details: Details
) -> str | None:
    """The deciding metric thick, with its intervals and references; others of its scale thin and grey."""
    points = _metric_series(evaluations, metric)
    if not points[0]:
        return None
    figure, axes = _axes(metric, restarts)
    bounded = metric not in UNBOUNDED
    names = {
        name
        for one in evaluations
        for name in one.metrics
        if "/" not in name and name != metric and name.partition(SET)[0] not in UNBOUNDED
    }
    alike = [name for name in sorted(names) if _is_share(_metric_series(evaluations, name)) == _is_share(points)]
    for number, name in enumerate(alike if bounded else ()):
        line = LINES[number % len(LINES)]
        axes.plot(*_metric_series(evaluations, name), color=MUTED, linewidth=1, linestyle=line, alpha=0.7, label=name)
    for number, (name, value) in enumerate(details.references.items()):
        colour = SERIES[(number + 2) % len(SERIES)]
        axes.axhline(value, color=colour, linewidth=1.3, linestyle="-.", label=f"{name} {value:.3g}")
    for one in evaluations:
        if one.step in points[0] and (between := one.intervals.get(metric)):
            axes.plot([one.step, one.step], between, color=SERIES[0], linewidth=5, alpha=0.25, solid_capstyle="butt")
    axes.plot(*points, color=SERIES[0], marker="o", markersize=5, linewidth=2.6, label=metric)
    _mark_best(axes, best_step)
    lines = -(-len(axes.get_legend_handles_labels()[1]) // 2)
    figure.set_size_inches(SIZE_INCHES[0], SIZE_INCHES[1] + lines * LEGEND_LINE_INCHES)  # the curves keep their height
    figure.legend(loc="outside lower center", ncols=2)
    best = dict(zip(*points, strict=True)).get(float(best_step)) if best_step is not None else None
    told = f", {best:.4g} at the best step {best_step}" if best is not None else ""
    against = "".join(f"; {name} {value:.4g}" for name, value in details.references.items())
    return as_svg(figure, f"{metric} by step, from {points[1][0]:.4g} to {points[1][-1]:.4g}{told}{against}")


def _is_share(points: Points) -> bool:
    """Whether values lie from 0 to 1; others are percents, or have a scale of their own."""
    return all(0 <= value <= 1 for value in points[1])


def _single(steps: Sequence[StepEvent], name: str, title: str, restarts: list[float], smooth: bool) -> str | None:
    points = _series(steps, name)
    if not points[0]:
        return None
    figure, axes = _axes(title, restarts)
    _noisy(axes, points, SERIES[2], None, smooth)
    axes.set_ylim(bottom=0)
    return as_svg(figure, f"{title} by step, from {points[1][0]:.4g} to {points[1][-1]:.4g}")


def _axes(title: str, restarts: list[float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for number, step in enumerate(restarts):
        told = None if number else "taken up again"
        axes.axvline(step, color=MUTED, linewidth=1, linestyle=":", label=told)
    return figure, axes


def _noisy(axes: Any, points: Points, colour: str, label: str | None, smooth: bool) -> None:
    """A curve; where it is long and noisy, faint with its running mean over it."""
    steps, values = points
    smooth = smooth and len(values) > 50
    axes.plot(steps, values, color=colour, linewidth=0.8 if smooth else 1.5, alpha=0.3 if smooth else 1.0)
    axes.plot(steps, _smoothed(values) if smooth else values, color=colour, linewidth=1.6, label=label)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean, corrected for its start as Adam corrects its moments."""
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        result.append(mean / (1 - SMOOTHING**count))
    return result


def _mark_best(axes: Any, best_step: int | None) -> None:
    if best_step is not None:
        axes.axvline(best_step, color=INK, linewidth=1, linestyle="--", alpha=0.6, label=f"best, step {best_step}")


def as_svg(figure: Any, title: str) -> str:
    """The figure as one <svg> element without prolog, metadata or fixed colours."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title}):  # ids that differ between the plots of a page, and in no other way
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # a style sheet within a plot holds for every element of the page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    for stand_in, colour in CSS.items():
        text = text.replace(stand_in, colour)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" stroke-linejoin="round" ', 1)
