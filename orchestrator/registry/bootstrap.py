"""Is one checkpoint better than another beyond the luck of the evaluation rows? The paired bootstrap.

Both checkpoints are scored on the same rows; rows are drawn again with replacement, the same draw for both, and the
difference of the metric is taken each time (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; for metrics
of language systems Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).

Knows arrays of per-row numbers and the task's metrics; nothing of runs or registries.
"""

import warnings
from collections.abc import Iterator, Mapping
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


def resample(scores: RowScores, task: Task, metric: str, seed: int, resamples: int = RESAMPLES) -> Array:
    """A metric over rows drawn again with replacement, [resamples]; nan for a draw that leaves it undefined, as one of
    equal values does a correlation. One seed draws the same rows of every model.

    Args:
        scores: per-row numbers of `Task.score`, each [rows], in the order of the rows.
    """
    values = (task.metric_value(metric, rows) for rows in _draws(scores, seed, resamples))
    return np.fromiter(values, np.float64, resamples)


def percentiles(draws: Array) -> tuple[float, float]:
    """The interval that holds the middle `CONFIDENCE` of the draws that define the metric; nan where none does."""
    tail, defined = 100 * (1 - CONFIDENCE) / 2, draws[~np.isnan(draws)]
    if len(defined) == 0:
        return np.nan, np.nan
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def compare(
    first: RowScores,
    second: RowScores,
    task: Task,
    metric: str,
    seed: int,
    resamples: int = RESAMPLES,
    first_draws: Array | None = None,
) -> Interval:
    """Percentile interval of metric(first) - metric(second).

    Args:
        first: per-row numbers of `Task.score`, each [rows].
        second: the same over the same rows in the same order.
        seed: of the draws.
        resamples: number of draws.
        first_draws: `resample` of the first with the same seed and number, where it is at hand.
    """
    mine = resample(first, task, metric, seed, resamples) if first_draws is None else first_draws
    low, high = percentiles(mine - resample(second, task, metric, seed, resamples))
    return Interval(task.metric_value(metric, first) - task.metric_value(metric, second), low, high)


def metric_interval(scores: RowScores, task: Task, metric: str, seed: int, resamples: int) -> tuple[float, float]:
    """Percentile interval of one model's metric over its evaluation rows."""
    return percentiles(resample(scores, task, metric, seed, resamples))


def all_intervals(scores: RowScores, task: Task, seed: int, resamples: int) -> dict[str, tuple[float, float]]:
    """Percentile interval of every metric of one model, by name; nan where no draw defines it."""
    with warnings.catch_warnings(action="ignore"):  # a draw without one of the classes is no news
        drawn = [task.measure(rows) for rows in _draws(scores, seed, resamples)]
    names = dict.fromkeys(name for metrics in drawn for name in metrics)
    return {name: percentiles(np.array([metrics.get(name, np.nan) for metrics in drawn])) for name in names}


def _draws(scores: RowScores, seed: int, resamples: int) -> Iterator[dict[str, Array]]:
    """Rows drawn again with replacement."""
    size, generator = len(next(iter(scores.values()))), np.random.default_rng(seed)
    for _ in range(resamples):
        rows = generator.integers(0, size, size)
        yield {name: numbers[rows] for name, numbers in scores.items()}
