"""Two or more trained models side by side: how their jobs differ, and whether their metrics do beyond luck.

The first one is what the others are compared with. Pure but for reading what runs and versions left behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from orchestrator.registry.promotion import RowScores
from orchestrator.registry.read import ModelVersion, row_scores_of
from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import Interval, compare_all
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.records import Array, Record
from trainers.run.folder import Evaluation
from trainers.run.row_scores import ROW, read_labels, read_row_scores
from trainers.storage import Folder
from trainers.tasks import load_task
from trainers.tasks.options import task_options

UNLIKE = ("name", "storage")
"""Fields of a job that say nothing of what is trained."""


@dataclass(frozen=True)
class Side:
    """One model that is compared."""

    name: str
    job: Job
    step: int
    metrics: dict[str, float]
    rows: RowScores
    labels: tuple[str, ...]


class Difference(Record):
    """A metric of a model minus the first one's, with the paired bootstrap's interval where rows pair. Metrics of the
    jobs' own have none, for their code is not run to compare, nor have those over other evaluation sets."""

    value: float
    low: float | None = None
    high: float | None = None


class MetricLine(Record):
    """One metric of all models."""

    metric: str
    values: list[float | None]
    differences: list[Difference | None]
    """Of the second model and those after it."""


class Comparison(Record):
    """What `tuneyard compare` shows."""

    names: list[str]
    steps: list[int]
    jobs: dict[str, list[Any]]
    """Fields of the jobs that differ, each model's value."""
    metrics: list[MetricLine]
    notes: list[str]


def side_of_run(run: Folder, job: Job, evaluation: Evaluation) -> Side:
    """A run's checkpoint."""
    try:
        numbers = read_row_scores(run, evaluation.step)
    except EvaluationError:
        numbers = {}
    rows = RowScores(run.name, evaluation.eval_key, numbers)
    return Side(run.name, job, evaluation.step, evaluation.metrics, rows, tuple(read_labels(run, evaluation.step)))


def side_of_version(version: ModelVersion) -> Side:
    """A registered version."""
    labels = tuple(read_labels(Folder(version.run), version.step))
    job = parse_job(yaml.safe_load(version.lineage["job"]))
    return Side(f"version {version.version}", job, version.step, version.metrics, row_scores_of(version), labels)


def compare_sides(sides: Sequence[Side], seed: int = 0) -> Comparison:
    """All that differs between the models."""
    first, *others = sides
    names = {name for side in sides for name in side.metrics if "/" not in name}
    deciding = first.job.evaluate.metric or load_task(first.job.task).metric
    obstacles = [_obstacle(first, other) for other in others]
    task = load_task(first.job.task, task_options(first.job))
    task.labels = first.labels
    weighed = [
        compare_all(_columns(other), _columns(first), task, seed) if obstacle is None else {}
        for other, obstacle in zip(others, obstacles, strict=True)
    ]
    lines = []
    for name in sorted(names, key=lambda name: (name != deciding, name)):
        differences = [_difference(first, other, name, found) for other, found in zip(others, weighed, strict=True)]
        values = [side.metrics.get(name) for side in sides]
        lines.append(MetricLine(metric=name, values=values, differences=differences))
    return Comparison(
        names=[side.name for side in sides],
        steps=[side.step for side in sides],
        jobs=job_differences([side.job for side in sides]),
        metrics=lines,
        notes=[obstacle for obstacle in obstacles if obstacle],
    )


def job_differences(jobs: Sequence[Job]) -> dict[str, list[Any]]:
    """Fields that are not alike in all jobs, as section.key."""
    flat = [_flatten(job.model_dump(mode="json")) for job in jobs]
    names = sorted({name for fields in flat for name in fields} - set(UNLIKE))
    values = {name: [fields.get(name) for fields in flat] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    named = {f"{prefix}.{key}" if prefix else str(key): part for key, part in value.items()}
    return {name: leaf for key, part in named.items() for name, leaf in _flatten(part, key).items()}


def _obstacle(first: Side, other: Side) -> str | None:
    """Why two models cannot be compared row by row, or None."""
    if first.job.task != other.job.task:
        return f"{other.name} is of task {other.job.task}, {first.name} of {first.job.task}: no interval"
    if first.rows.eval_key != other.rows.eval_key:
        return f"{other.name} was evaluated on other data than {first.name}: no interval"
    for side in (first, other):
        if len(side.rows.numbers.get(ROW, ())) == 0:
            return f"the evaluation rows of {side.name} are gone (`tuneyard evaluate` writes them): no interval"
    same = np.array_equal(first.rows.numbers[ROW], other.rows.numbers[ROW])
    return None if same else f"{other.name} and {first.name} were scored on different rows: no interval"


def _columns(side: Side) -> dict[str, Array]:
    return {name: values for name, values in side.rows.numbers.items() if name != ROW}


def _difference(first: Side, other: Side, metric: str, weighed: Mapping[str, Interval]) -> Difference | None:
    if metric not in first.metrics or metric not in other.metrics:
        return None
    found, value = weighed.get(metric), other.metrics[metric] - first.metrics[metric]
    return Difference(value=value, low=found.low, high=found.high) if found else Difference(value=value)
