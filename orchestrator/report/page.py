"""report.html: one page on a run that needs no network, no scripts and no other file.

Gathers what the run left behind; every text that came from outside is escaped by the template. Curves are drawn by
`report_plots.py`, tables made by `report_tables.py`, the page itself is templates/report.html.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.registry.lineage import resolved_yaml
from orchestrator.report.plots import draw_curves
from orchestrator.report.tables import class_tables, evaluation_table, ledger_table, number, stage_table
from trainers.credentials import hide_credentials
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.run.events import Event
from trainers.run.folder import RunResult
from trainers.run.row_scores import read_labels, read_row_scores
from trainers.shards.manifest import Shards
from trainers.storage import Folder

REPORT = "report.html"
TEMPLATE = Path(__file__).parent / "report.html"
NOT_SHOWN = ("job",)
"""Lineage that stands elsewhere on the page."""


def write_report(
    run: Folder,
    result: RunResult,
    job: Job,
    events: Sequence[Event],
    shards: Shards | None = None,
    lineage: Mapping[str, str] | None = None,
) -> None:
    """Write report.html into the run folder, over an earlier one.

    Args:
        run: the run folder; the best checkpoint's evaluation rows are read from it.
        result: the outcome, evaluations included.
        job: as it ran.
        events: of the whole run, as `read_events` gives them.
        shards: for the data ledger and the names of classes.
        lineage: as `lineage.lineage` gives it.
    """
    run.write_bytes(REPORT, render_report(run, result, job, events, shards, lineage).encode())


def render_report(
    run: Folder,
    result: RunResult,
    job: Job,
    events: Sequence[Event],
    shards: Shards | None = None,
    lineage: Mapping[str, str] | None = None,
) -> str:
    """The page as text; the arguments are those of `write_report`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    best = result.best or {}
    step = best.get("step")
    best_step = step if isinstance(step, int) else None
    curves = draw_curves(events, result.evaluations, best_step)
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(
        job=job,
        result=result,
        run_name=run.name,
        cards=_cards(result),
        plots=[Markup(svg) for svg in curves],  # ours; matplotlib escaped the names in it
        evaluations=evaluation_table(result.evaluations, best_step),
        classes=_classes(run, job, best_step, shards),
        ledger=ledger_table(shards) if shards else None,
        stages=stage_table(result.seconds),
        origin=[(name, hide_credentials(text)) for name, text in (lineage or {}).items() if name not in NOT_SHOWN],
        job_yaml=resolved_yaml(job),
    )


def _cards(result: RunResult) -> list[dict[str, str]]:
    """The headline figures."""
    best, registry = result.best or {}, result.registry
    cards = []
    if best:
        cards.append(_card(str(best.get("metric")), number(best.get("value")), f"best, at step {best.get('step')}"))
    if registry:
        cards.append(_card("registered as", f"{registry.model} v{registry.version}", registry.alias or "not promoted"))
    cards += [
        _card("steps", f"{result.steps:,}", f"{result.tokens:,} tokens"),
        _card(
            "wall time",
            duration(sum(result.seconds.values())),
            f"{result.restarts or 'no'} restart{'' if result.restarts == 1 else 's'}",
        ),
        _card("goodput", f"{result.goodput:.0%}", "of training time in kept steps"),
    ]
    return cards


def _card(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _classes(run: Folder, job: Job, best_step: int | None, shards: Shards | None) -> dict[str, Any] | None:
    """Per-class figures of the best checkpoint, where the task has classes and the rows are still there."""
    if job.task != "classify" or best_step is None:
        return None
    try:
        row_scores = read_row_scores(run, best_step)
    except EvaluationError:
        return None
    if "label" not in row_scores:  # several labels a row: metrics by class stand in the table of evaluations
        return None
    names = tuple(shards.train.labels) if shards else tuple(read_labels(run, best_step))
    return {"step": best_step, **class_tables(row_scores["label"], row_scores["prediction"], names)}
