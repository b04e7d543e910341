"""Is one checkpoint better than another beyond the luck of the evaluation rows? The paired bootstrap.

Both checkpoints are scored on the same rows; rows are drawn again with replacement, the same draw for both, and the
difference of the metric is taken each time (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; for metrics
of language systems Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).

Knows arrays of per-row numbers and the task's `metrics`; nothing of runs or registries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainers.records import Array
from trainers.tasks import Task

RowScores = Mapping[str, Array]
Statistic = Callable[[RowScores], float]

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
        task: whose `metrics` are computed.
        metric: the one compared.
        seed: of the draws.
        resamples: number of draws.
    """
    size = len(next(iter(first.values())))
    measure_first, measure_second = pick_statistic(first, task, metric), pick_statistic(second, task, metric)
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for draw in range(resamples):
        rows = generator.integers(0, size, size)
        differences[draw] = measure_first(_take(first, rows)) - measure_second(_take(second, rows))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    return Interval(measure_first(first) - measure_second(second), float(low), float(high))


def _take(row_scores: RowScores, rows: Array) -> dict[str, Array]:
    return {name: values[rows] for name, values in row_scores.items()}


def pick_statistic(row_scores: RowScores, task: Task, metric: str) -> Statistic:
    """The metric as a function of per-row numbers: a quick form where one gives the task's own value, else the task's.

    scikit-learn takes 20 ms for all metrics of 10,000 rows, 40 s for two thousand draws; the quick forms one.
    """
    quick = QUICK.get(metric)
    if quick is not None:
        try:
            if np.isclose(quick(row_scores), task.metrics(row_scores)[metric], rtol=1e-9, atol=1e-12):
                return quick
        except KeyError:  # this task's rows hold other numbers
            pass
    return lambda rows: task.metrics(rows)[metric]


def _loss(row_scores: RowScores) -> float:
    """Mean over targets where rows have several, else over rows."""
    losses = row_scores["loss_sum"]
    return float(losses.sum() / (row_scores["targets"].sum() if "targets" in row_scores else len(losses)))


def _perplexity(row_scores: RowScores) -> float:
    return float(np.exp(_loss(row_scores)))


def _token_accuracy(row_scores: RowScores) -> float:
    return float(row_scores["correct"].sum() / row_scores["targets"].sum())


def _accuracy(row_scores: RowScores) -> float:
    return float((row_scores["label"] == row_scores["prediction"]).mean())


@dataclass(frozen=True)
class _Counts:
    """Rows by class, each [classes]."""

    hits: Array
    labels: Array
    predictions: Array


def _count(row_scores: RowScores) -> _Counts:
    label, prediction = row_scores["label"], row_scores["prediction"]
    size = int(max(label.max(), prediction.max())) + 1
    return _Counts(
        np.bincount(label[label == prediction], minlength=size),
        np.bincount(label, minlength=size),
        np.bincount(prediction, minlength=size),
    )


def _f1_by_class(counts: _Counts) -> Array:
    """2 hits / (labels + predictions), for the classes that occur; the others are NaN."""
    total = (counts.labels + counts.predictions).astype(np.float64)
    total[total == 0] = np.nan
    scores: Array = 2 * counts.hits / total
    return scores


def _f1_macro(row_scores: RowScores) -> float:
    return float(np.nanmean(_f1_by_class(_count(row_scores))))


def _f1_weighted(row_scores: RowScores) -> float:
    counts = _count(row_scores)
    return float(np.nansum(_f1_by_class(counts) * counts.labels) / counts.labels.sum())


def _mcc(row_scores: RowScores) -> float:
    """Gorodkin's R_K from the class counts; 0 where either side is constant, as scikit-learn has it."""
    counts = _count(row_scores)
    size, hits = float(counts.labels.sum()), float(counts.hits.sum())
    labels, predictions = counts.labels.astype(np.float64), counts.predictions.astype(np.float64)
    spread = (size**2 - predictions @ predictions) * (size**2 - labels @ labels)
    return float((hits * size - labels @ predictions) / np.sqrt(spread)) if spread > 0 else 0.0


QUICK: dict[str, Statistic] = {
    "loss": _loss,
    "perplexity": _perplexity,
    "token_accuracy": _token_accuracy,
    "accuracy": _accuracy,
    "f1_micro": _accuracy,
    "f1_macro": _f1_macro,
    "f1_weighted": _f1_weighted,
    "mcc": _mcc,
}
"""Metrics with a form that needs no library; each is used only after it gave the task's own value on the whole set."""
