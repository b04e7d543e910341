"""`tuneyard compare`: runs side by side, the differences of their jobs first, then their metrics."""

from typing import Any

from orchestrator.registry.comparison import Comparison, Difference, Side, side_of_run
from orchestrator.terminal.table import show
from trainers.errors import EvaluationError, JobError
from trainers.evaluation.selection import select
from trainers.job.schema import Job
from trainers.run.folder import read_evaluations
from trainers.storage import Folder
from trainers.tasks import choose_metric


def best_side(job: Job, run: Folder) -> Side:
    """The best evaluated checkpoint of a run. Raises JobError where none is evaluated."""
    try:
        return side_of_run(run, job, select(read_evaluations(run), *choose_metric(job)))
    except EvaluationError as error:
        raise JobError(f"{run}: {error}") from error


def show_comparison(comparison: Comparison) -> None:
    """Two tables and the notes."""
    names = [f"{name} step {step}" for name, step in zip(comparison.names, comparison.steps, strict=True)]
    jobs = [(field, *map(_value, values)) for field, values in comparison.jobs.items()]
    show("jobs: what differs", ("field", *names), jobs or [("nothing", *("" for _ in names))])
    head, *others = names
    rows = [
        (line.metric, line.values[0], *(_cell(*pair) for pair in zip(line.values[1:], line.differences, strict=True)))
        for line in comparison.metrics
    ]
    show(
        "metrics, with the difference from the first and its 95 % interval; * which leaves out zero",
        ("metric", head, *others),
        rows,
    )
    for note in comparison.notes:
        print(f"note: {note}")


def _value(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict | float) else value


def _cell(value: float | None, difference: Difference | None) -> str:
    if value is None or difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{value:.4g} ({difference.value:+.4g})"
    sure = "" if difference.low <= 0 <= difference.high else " *"
    return f"{value:.4g} ({difference.value:+.4g}, {difference.low:+.4g} to {difference.high:+.4g}){sure}"
