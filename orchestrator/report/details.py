"""What the report shows beyond the run's own records: reference values, rows. Read from the run's folder.

Whatever cannot be read any more is left out: a report of a run that failed has little of it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from orchestrator.registry.manage import champions
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.read import find_model
from trainers.errors import EvaluationError, TuneyardError
from trainers.evaluation.row_views import RowView, costliest_rows, generations
from trainers.records import Array
from trainers.run.folder import RunResult
from trainers.run.record import Run
from trainers.run.row_scores import ROW, read_row_scores
from trainers.shards.shown import ShownSequence, show_sequence
from trainers.tasks import SET, choose_metric
from trainers.tokenizer.encoder import load_encoder

MOST_ROWS = 20


@dataclass(frozen=True)
class Details:
    """Parts of the report that are read from evaluation rows."""

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
    references = _references(run, choose_metric(run.job)[0], result)
    try:
        costliest, generated = costliest_rows(run, best, MOST_ROWS), generations(run, best, MOST_ROWS)
    except (TuneyardError, OSError, KeyError):
        costliest, generated = [], []
    return Details(references, tuple(costliest), tuple(generated), example)


def measure_guesses(run: Run, step: int) -> dict[str, dict[str, float]]:
    """Metrics of answers that need no reading, by what they are, over the rows of an evaluated step."""
    task, seed = run.load_task(), run.job.train.seed
    baselines: dict[str, dict[str, float]] = {}
    for held in run.shards.held:
        if not (numbers := _numbers(run, step, held)):
            continue
        where = f"{held and SET}{held}"
        with suppress(EvaluationError):  # rows of an earlier version lack what these are made of
            for guess, scores in task.guesses(numbers, seed).items():
                values = {f"{name}{where}": value for name, value in task.measure(scores).items()}
                baselines[guess] = baselines.get(guess, {}) | values
    return baselines


def _first_sequence(run: Run) -> ShownSequence | None:
    try:
        task, encoder = run.load_task(), load_encoder(run.model.path, run.job.model.trust_remote_code)
        task.prepare(encoder)
        return show_sequence(run.open_shards("train", task), 0, task, encoder)
    except (TuneyardError, OSError, IndexError):
        return None


def _numbers(run: Run, step: int, held: str = "") -> dict[str, Array]:
    try:
        return {name: values for name, values in read_row_scores(run.folder, step, held).items() if name != ROW}
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


def _references(run: Run, metric: str, result: RunResult) -> dict[str, float]:
    """The champion before, the pretrained model where it was evaluated, and answers that need no reading."""
    references = dict(_champion(run, result, metric))
    pretrained: Mapping[str, float] = next((one.metrics for one in result.evaluations if one.step == 0), {})
    if metric in pretrained:
        references["pretrained"] = pretrained[metric]
    values = {name: metrics.get(metric, math.nan) for name, metrics in result.baselines.items()}
    return references | {name: value for name, value in values.items() if math.isfinite(value)}
