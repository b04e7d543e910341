"""What the report shows beyond the run's own records: intervals, reference values, rows. Read from the run's folder.

Whatever cannot be read any more is left out: a report of a run that failed has little of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.registry.bootstrap import metric_interval
from orchestrator.registry.manage import champions
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.promotion import RowScores, chance_baselines
from orchestrator.registry.read import find_model
from trainers.errors import TuneyardError
from trainers.evaluation.row_views import RowView, costliest_rows, generations
from trainers.records import Array
from trainers.run.folder import RunResult
from trainers.run.record import Run
from trainers.run.row_scores import ROW, read_row_scores
from trainers.shards.shown import ShownSequence, show_sequence
from trainers.tasks import Task, choose_metric
from trainers.tokenizer.encoder import load_encoder

MOST_INTERVALS = 20
"""Evaluated steps that get an interval: the last ones and the best."""
RESAMPLES = 200
MOST_ROWS = 20


@dataclass(frozen=True)
class Details:
    """Parts of the report that are read from evaluation rows."""

    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """By step: where the deciding metric may lie."""
    references: Mapping[str, float] = field(default_factory=dict)
    """The deciding metric of what the run is measured against."""
    costliest: tuple[RowView, ...] = ()
    generated: tuple[RowView, ...] = ()
    example: ShownSequence | None = None
    """The first training sequence."""


def gather(run: Run, result: RunResult) -> Details:
    """Read what there is."""
    best, example = (result.best or {}).get("step"), _first_sequence(run)
    if not isinstance(best, int):
        return Details(example=example)
    metric, _ = choose_metric(run.job)
    task, seed = run.load_task(), run.job.train.seed
    done = [one.step for one in result.evaluations if one.status == "done" and metric in one.metrics]
    intervals = {}
    for step in sorted({*done[-MOST_INTERVALS:], best}):
        if numbers := _numbers(run, step):
            intervals[step] = metric_interval(numbers, task, metric, seed, RESAMPLES)
    references = _references(run, task, metric, best, result)
    try:
        costliest, generated = costliest_rows(run, best, MOST_ROWS), generations(run, best, MOST_ROWS)
    except (TuneyardError, OSError, KeyError):
        costliest, generated = [], []
    return Details(intervals, references, tuple(costliest), tuple(generated), example)


def _first_sequence(run: Run) -> ShownSequence | None:
    try:
        task, encoder = run.load_task(), load_encoder(run.model.path, run.job.model.trust_remote_code)
        task.prepare(encoder)
        return show_sequence(run.open_shards("train", task), 0, task, encoder)
    except (TuneyardError, OSError, IndexError):
        return None


def _numbers(run: Run, step: int) -> dict[str, Array]:
    try:
        return {name: values for name, values in read_row_scores(run.folder, step).items() if name != ROW}
    except TuneyardError:
        return {}


def _champion(run: Run, result: RunResult, metric: str) -> Iterator[tuple[str, float]]:
    """The champion that this run was weighed against, where it was evaluated on the same rows."""
    job = run.job
    try:
        model = find_model(registry_uri(job.storage, job.registry.uri), job.registry.model or job.name)
        own = result.registry.version if result.registry else None
        before = [number for number in champions(model) if number != own]
        for version in model.ours():
            if before and version.version == before[-1] and version.eval_key == run.shards.eval.key:
                yield f"champion (version {version.version})", version.metrics[metric]
    except (TuneyardError, KeyError):
        return


def _references(run: Run, task: Task, metric: str, best: int, result: RunResult) -> dict[str, float]:
    """The champion before, the pretrained model where it was evaluated, and chance where the task has classes."""
    references = dict(_champion(run, result, metric))
    pretrained: Mapping[str, float] = next((one.metrics for one in result.evaluations if one.step == 0), {})
    if metric in pretrained:
        references["pretrained"] = pretrained[metric]
    numbers = _numbers(run, best)
    if numbers:
        chance = chance_baselines(RowScores("best", "", numbers), run.job.train.seed)
        values = {one.name: task.metrics(one.numbers).get(metric) for one in chance}
        references |= {name: value for name, value in values.items() if value is not None}
    return references
