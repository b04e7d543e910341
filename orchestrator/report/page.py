"""report.html: one page on a run that needs no network, no scripts and no other file.

Every text that came from outside is escaped by the template, `report.html`. `plots.py` draws the curves, `tables.py`
makes the tables, `details.py` reads the evaluation rows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.registry.lineage import resolved_yaml
from orchestrator.report.details import Details
from orchestrator.report.html import render_page
from orchestrator.report.memory import memory_table
from orchestrator.report.plots import draw_curves
from orchestrator.report.table import Table, text
from orchestrator.report.tables import (
    classes,
    evaluation_table,
    ledger_table,
    profile_table,
    table_by_class,
    time_table,
)
from trainers.credentials import hide_credentials
from trainers.errors import EvaluationError
from trainers.evaluation.row_views import RowView
from trainers.job.schema import FormatName, Job
from trainers.run.describe import duration, interval
from trainers.run.events import Event
from trainers.run.folder import Evaluation, RunResult
from trainers.run.row_scores import read_labels, read_row_scores
from trainers.shards.manifest import Shards
from trainers.shards.shown import ShownSequence, stretches
from trainers.sources.place import place_of
from trainers.storage import Folder
from trainers.tasks import choose_metric, load_task

REPORT = "report.html"
TEMPLATE = Path(__file__).parent / "report.html"
SHOWN_AS_JOB = "job"
"""The lineage entry that the page shows as the resolved job."""
MOST_TOKENS = 2000
"""Tokens of the training example that are shown."""
FOLDED = ("digest", "key", "identity", "version.")
"""Parts of the names of lineage entries that only machines read; the page folds them."""


def render_report(
    run: Folder,
    result: RunResult,
    job: Job,
    events: Sequence[Event],
    shards: Shards | None = None,
    lineage: Mapping[str, str] | None = None,
    details: Details | None = None,
) -> str:
    """The page as text.

    Args:
        run: the run folder; the best checkpoint's evaluation rows are read from it.
        result: the outcome, evaluations included.
        job: as it ran.
        events: of the whole run, as `read_events` gives them.
        shards: for the data ledger and the names of classes.
        lineage: as `lineage.lineage` gives it.
        details: as `details.gather` gives them.
    """
    from markupsafe import Markup

    details, (metric, _) = details or Details(), choose_metric(job)
    step = (result.best or {}).get("step")
    best_step = step if isinstance(step, int) else None
    best = next((one for one in result.evaluations if one.step == best_step), None)
    curves = draw_curves(events, result.evaluations, best_step, metric, details)
    origin = {name: hide_credentials(value) for name, value in (lineage or {}).items() if name != SHOWN_AS_JOB}
    folded = {name for name in origin if any(part in name for part in FOLDED)}
    return render_page(
        TEMPLATE,
        job=job,
        result=result,
        run_name=run.name,
        cards=_cards(result),
        plots=[Markup(svg) for svg in curves],  # ours; matplotlib escaped the names in it
        evaluations=evaluation_table(result.evaluations, metric, best_step, None, result.baselines),
        notes=sorted({name: note for one in result.evaluations for name, note in one.notes.items()}.items()),
        classes=_classes(run, job, best, shards),
        best_step=best_step,
        costliest=_row_table("costliest evaluation rows", details.costliest),
        generated=_row_table("generated texts", details.generated),
        example=_example(details.example, job.data.format),
        loading=_loading(job, result),
        ledger=ledger_table(shards.all) if shards else None,
        stages=time_table(result.accounting or result.seconds),
        profile=profile_table(events),
        memory=memory_table(_plan(run), events),
        origin=[(name, value) for name, value in origin.items() if name not in folded],
        folded=[(name, value) for name, value in origin.items() if name in folded],
        job_yaml=resolved_yaml(job),
    )


def _row_table(title: str, views: Sequence[RowView]) -> Table:
    rows = [(one.text, one.label, one.prediction, one.loss, one.place) for one in views]
    return Table(title, ("text", "label", "prediction", "loss", "where"), rows)


def _example(sequence: ShownSequence | None, format: FormatName | None) -> dict[str, Any] | None:
    """The first training sequence in stretches of text, each a target or none; a long one loses its end."""
    if sequence is None:
        return None
    return {
        "where": place_of(sequence.file, sequence.position, format),
        "tokens": len(sequence.tokens),
        "targets": sum(token.target for token in sequence.tokens),
        "values": dict(sequence.values),
        "stretches": list(stretches(sequence.tokens[:MOST_TOKENS])),
        "left_out": max(len(sequence.tokens) - MOST_TOKENS, 0),
    }


def _loading(job: Job, result: RunResult) -> str | None:
    """Three lines of Python that load the registered folder."""
    if result.registry is None:
        return None
    auto, folder = load_task(job.task).auto_class, result.registry.source
    return (
        f"from transformers import AutoTokenizer, {auto}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        f"model = {auto}.from_pretrained({folder!r})"
    )


def _cards(result: RunResult) -> list[dict[str, str]]:
    """The headline figures."""
    best, registry, step = result.best or {}, result.registry, (result.best or {}).get("step")
    cards = []
    if best:
        between = result.intervals.get(str(best.get("metric")))
        likely = f"; 95 %: {interval(*between)}" if between else ""
        cards.append(_card(str(best.get("metric")), text(best.get("value")), f"best, at step {step}{likely}"))
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


def _classes(run: Folder, job: Job, best: Evaluation | None, shards: Shards | None) -> dict[str, Any] | None:
    """Figures by class of the best checkpoint; with the confusion matrix where each row has one of them and the rows
    are still there."""
    if best is None:
        return None
    try:
        row_scores = read_row_scores(run, best.step)
    except EvaluationError:
        row_scores = {}
    if job.task == "classify" and "label" in row_scores:
        names = tuple(shards.train.labels) if shards else tuple(read_labels(run, best.step))
        return classes(row_scores["label"], row_scores["prediction"], names, best.intervals)
    table = table_by_class(best, list(job.data.eval_sets))
    return {"table": table, "counts": None, "confusions": None} if table else None


def _plan(run: Folder) -> dict[str, Any]:
    """The plan that the run began with, if it is there."""
    try:
        return dict(json.loads(run.read_bytes("plan.json")))
    except (OSError, ValueError):
        return {}
