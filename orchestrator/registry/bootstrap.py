"""Is one checkpoint better than another beyond the luck of the evaluation rows? The paired bootstrap.

Both checkpoints are scored on the same rows; rows are drawn again with replacement, the same draw for both, and the
difference of the metric is taken each time (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; for metrics
of language systems Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).

Knows arrays of per-row numbers and the task's metrics; nothing of runs or registries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainers.records import Array
from trainers.tasks import Task

RowScores = Mapping[str, Array]

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The difference of a metric, first minus second, and its bootstrap interval."""

    difference: float
    low: float
    high: float


def compare(
    first: RowScores, second: RowScores, task: Task, metric: str, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Percentile interval of metric(first) - metric(second).

    Args:
        first: per-row numbers of `Task.score`, each [rows].
        second: the same over the same rows in the same order.
        task: whose `metrics` are meant.
        metric: the one compared.
        seed: of the draws.
        resamples: number of draws.
    """
    size = len(next(iter(first.values())))
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for draw in range(resamples):
        rows = generator.integers(0, size, size)
        samples = [{name: values[rows] for name, values in scores.items()} for scores in (first, second)]
        differences[draw] = task.metric_value(metric, samples[0]) - task.metric_value(metric, samples[1])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    difference = task.metric_value(metric, first) - task.metric_value(metric, second)
    return Interval(difference, float(low), float(high))


def metric_interval(
    scores: RowScores, task: Task, metric: str, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of one model's metric over its evaluation rows."""
    size = len(next(iter(scores.values())))
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, size, size) for _ in range(resamples))
    values = [task.metric_value(metric, {name: numbers[rows] for name, numbers in scores.items()}) for rows in draws]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
