"""How far a metric may lie from the truth by the luck of the evaluation rows, and whether one checkpoint is better than
another beyond it: the bootstrap, and the paired bootstrap.

Rows are drawn again with replacement, the same draw for all checkpoints, and the metric, or the difference of the
metric, is taken each time (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; for metrics of language
systems Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).

Knows arrays of per-row numbers and the task's metrics; nothing of runs or registries.
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trainers.errors import EvaluationError
from trainers.records import Array
from trainers.tasks import Mode, Task

RowScores = Mapping[str, Array]
Intervals = dict[str, tuple[float, float]]
"""By metric: between which two values it lies."""

RESAMPLES = 1000
CONFIDENCE = 0.95
BESIDE, MOST_DRAWN, FEWEST = 400, 2_000_000, 50
"""Draws for intervals beside the metrics of every evaluation, and rows of all of them together in as far as so few
draws allow: 2 s at the most, where a model needs minutes for the rows."""
OWN_S = 2.0
"""Seconds that the draws of a job's own metric may take; it is code that nobody knows."""
TRIES, TRIES_S = 5, 0.5
"""How often such a metric is timed at the most, and for how long."""


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
    return _over(scores, task, metric, _draws(scores, seed, resamples), resamples)


def resample_all(scores: RowScores, task: Task, seed: int, resamples: int = RESAMPLES) -> dict[str, Array]:
    """As `resample`, of every metric of the task by name, without those of the job's own."""
    with warnings.catch_warnings(action="ignore"):  # a draw without one of the classes is no news
        drawn = list(task.draw_metrics(scores, _draws(scores, seed, resamples)))
    names = dict.fromkeys(name for metrics in drawn for name in metrics)
    return {name: np.array([metrics.get(name, np.nan) for metrics in drawn]) for name in names}


def values(scores: RowScores, task: Task) -> dict[str, float]:
    """As `Task.metrics`, by what the draws are computed with: scikit-learn takes a second of CPU to import."""
    with warnings.catch_warnings(action="ignore"):
        return next(iter(task.draw_metrics(scores, [np.arange(_rows(scores))])))


def value(scores: RowScores, task: Task, metric: str) -> float:
    """One of `values`, or of the job's own; nan where rows leave it undefined."""
    if metric in task.options.metrics:
        return task.metric_value(metric, scores)
    return values(scores, task).get(metric, np.nan)


def percentiles(draws: Array, rows: int) -> tuple[float, float]:
    """The interval that holds the middle `CONFIDENCE` of the draws that define the metric, a little more where rows are
    few; nan where none does."""
    tail, defined = 100 * _tail(rows), draws[~np.isnan(draws)]
    if len(defined) == 0:
        return np.nan, np.nan
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def _tail(rows: int) -> float:
    """Share of the draws to either side of the interval. Draws of few rows vary too little, as a variance that is
    divided by n does, and a mean of few rows lies about the truth as Student's t: of 40 rows 2.0 %, of many 2.5 %
    (the expanded percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap", 2015)."""
    from scipy.special import ndtr, stdtrit  # cdf of the normal, quantile of Student's t; scipy.stats imports for 0.5 s

    tail = (1 - CONFIDENCE) / 2
    return float(ndtr(np.sqrt(rows / (rows - 1)) * stdtrit(rows - 1, tail))) if rows > 1 else 0.0


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
    low, high = percentiles(mine - resample(second, task, metric, seed, resamples), _rows(first))
    return Interval(value(first, task, metric) - value(second, task, metric), low, high)


def share_by_luck(
    first: RowScores, second: RowScores, task: Task, metric: str, mode: Mode, seed: int, resamples: int = RESAMPLES
) -> float:
    """Of pairs of models made by swapping each row between the two at random, and of the pair itself, the share whose
    difference of a metric, in the direction of `mode`, is as large as that of first over second.

    Where the two are equally good this is below a bound at most as often as the bound says, however few and skewed the
    rows (approximate randomization: Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989; Yeh, "More
    accurate tests for the statistical significance of result differences", COLING 2000).
    """
    rows, sign = _rows(first), -1.0 if mode == "min" else 1.0
    both = {name: np.concatenate([first[name], second[name]]) for name in first.keys() & second.keys()}

    def draws(of_second: bool) -> Iterator[Array]:
        generator = np.random.default_rng(seed)
        for _ in range(resamples):
            yield np.arange(rows) + rows * ((generator.random(rows) < 0.5) ^ of_second)

    mine, theirs = (_over(both, task, metric, draws(side), resamples) for side in (False, True))
    observed = sign * (value(first, task, metric) - value(second, task, metric))
    smaller = sign * (mine - theirs) < observed - 1e-12 * abs(observed)  # sums in another order differ in last bits
    return float((1 + (~smaller).sum()) / (1 + resamples))


def compare_all(
    first: RowScores, second: RowScores, task: Task, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """As `compare`, of every metric of the task that both have, without those of the job's own."""
    mine, theirs = (resample_all(one, task, seed, resamples) for one in (first, second))
    ours, others = values(first, task), values(second, task)
    pairs = {name: percentiles(draws - theirs[name], _rows(first)) for name, draws in mine.items() if name in theirs}
    known = [name for name in pairs if name in ours and name in others]
    return {name: Interval(ours[name] - others[name], *pairs[name]) for name in known}


def intervals_beside(scores: RowScores, task: Task, seed: int) -> tuple[Intervals, dict[str, str]]:
    """The interval of every metric of one model, in little time; and of metrics without one, why they have none."""
    rows = _rows(scores)
    resamples = min(BESIDE, max(MOST_DRAWN // max(rows, 1), FEWEST))
    draws, why = resample_all(scores, task, seed, resamples), {}
    for name in task.options.metrics:
        cost = _cost_s(scores, task, name, OWN_S / resamples)
        if cost * resamples > OWN_S:
            why[name] = f"no interval: {resamples} resamples of {cost:.2g} s each take longer than {OWN_S:g} s"
            continue
        draws[name] = resample(scores, task, name, seed, resamples)
    found = {name: percentiles(drawn, rows) for name, drawn in draws.items()}
    undefined = {name: "no interval: no resample defines it" for name, (low, _) in found.items() if np.isnan(low)}
    return {name: pair for name, pair in found.items() if name not in undefined}, why | undefined


def _cost_s(scores: RowScores, task: Task, metric: str, most_s: float) -> float:
    """Seconds that a metric takes: the least of a few tries, in as far as they are short, where the first is over the
    most. On a busy machine any try may hold a pause of some milliseconds, and 400 resamples in 2 s are 5 ms each."""
    cost, ends = np.inf, time.perf_counter() + TRIES_S
    for _ in range(TRIES):
        began = time.perf_counter()
        task.metric_value(metric, scores)
        cost = min(cost, time.perf_counter() - began)
        if cost <= most_s or time.perf_counter() > ends:
            break
    return float(cost)


def _rows(scores: RowScores) -> int:
    return len(next(iter(scores.values())))


def _over(scores: RowScores, task: Task, metric: str, draws: Iterator[Array], count: int) -> Array:
    """A metric of each draw, [count]."""
    if metric in task.options.metrics:
        return np.fromiter((_own(scores, task, metric, rows) for rows in draws), np.float64, count)
    with warnings.catch_warnings(action="ignore"):
        found = [metrics.get(metric, np.nan) for metrics in task.draw_metrics(scores, draws, metric)]
    return np.array(found, dtype=np.float64)


def _own(scores: RowScores, task: Task, metric: str, rows: Array) -> float:
    """A metric of the job's own over some rows; nan where it raises, as it may where they lack a class."""
    try:
        return task.metric_value(metric, {name: numbers[rows] for name, numbers in scores.items()})
    except EvaluationError:
        return np.nan


def _draws(scores: RowScores, seed: int, resamples: int) -> Iterator[Array]:
    """Places of rows drawn with replacement."""
    size, generator = _rows(scores), np.random.default_rng(seed)
    return (generator.integers(0, size, size) for _ in range(resamples))
