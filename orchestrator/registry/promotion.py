"""Whether a new version becomes the champion. Begin at `decide`, which is pure.

By rule `if_better` a version is promoted only where it beats the present champion beyond the 95 % interval of a paired
bootstrap over the same evaluation rows; what cannot be compared is never promoted. Before that it must beat what
needs no training: answers that need no reading, and the pretrained model where that has the task's head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    compare,
    percentiles,
    resample,
    share_by_luck,
    value,
    values,
)
from trainers.evaluation.selection import BASELINE
from trainers.records import Array, Record
from trainers.run.row_scores import ROW, read_row_scores
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tasks.metrics.own import TEXT

Rule = Literal["if_better", "always", "never"]


class Promotion(Record):
    """The decision, and why."""

    promote: bool
    reason: str
    champion: int | Literal["any"] | None = "any"
    """The version that it was weighed against; where another holds the alias by then, the decision is void."""


@dataclass(frozen=True)
class RowScores:
    """One model's evaluation, row by row."""

    name: str
    """How messages call it, e.g. "version 3"."""
    eval_key: str
    """Key of the evaluation shards."""
    numbers: Mapping[str, Array]
    """As `trainers.run.row_scores.read_row_scores` gives them; empty where the file is gone."""


def decide(
    rule: Rule,
    candidate: RowScores,
    champion: RowScores | None,
    task: Task,
    metric: str,
    mode: Literal["max", "min"],
    seed: int,
    baselines: Sequence[RowScores] = (),
    resamples: int = RESAMPLES,
) -> Promotion:
    """Apply a promotion rule to a candidate and the present champion, if there is one.

    Args:
        baselines: what the candidate must beat as well, over the same rows, as `baselines_of` gives them.
        resamples: draws of the bootstrap.
    """
    if rule == "always":
        return Promotion(promote=True, reason="promoted by rule: registry.promote is always")
    if rule == "never":
        return Promotion(promote=False, reason="not promoted by rule: registry.promote is never")
    standing = [replace(champion, name=f"the champion ({champion.name})")] if champion else []
    for other in (*baselines, *standing):
        if obstacle := _obstacle(candidate, other):
            return Promotion(promote=False, reason=f"not promoted: {obstacle}")
    reason = "the model has no champion yet"
    if not baselines and not standing:
        return Promotion(promote=True, reason=f"promoted: {reason}")
    known = (*values(_columns(candidate), task), *task.options.metrics)
    if metric not in known:
        raise EvaluationError(f"evaluate.metric: the task knows no {metric!r}, only {', '.join(known)}")
    if champion and metric in task.options.metrics and TEXT not in champion.numbers:
        reason = f"the champion ({champion.name}) was evaluated without {metric}, so the two do not compare"
        return Promotion(promote=False, reason=f"not promoted: {reason}; set registry.promote: always")
    draws = resample(_columns(candidate), task, metric, seed, resamples)
    for other in (*baselines, *standing):
        better, reason_of_pair = _weigh(candidate, draws, other, task, metric, mode, seed)
        if not better:
            return Promotion(promote=False, reason=f"not promoted: {reason_of_pair}")
        reason = reason_of_pair if champion else f"the model has no champion yet, and {reason_of_pair}"
    return Promotion(promote=True, reason=f"promoted: {reason}")


def baselines_of(run: Folder, candidate: RowScores, task: Task, seed: int) -> list[RowScores]:
    """What needs no training, over the candidate's rows: answers that need no reading, and the pretrained model where
    it has the task's head; without rows where it was not evaluated."""
    if len(candidate.numbers.get(ROW, ())) == 0:
        return []
    guesses = task.guesses(candidate.numbers, seed)
    baselines = [RowScores(name, candidate.eval_key, numbers) for name, numbers in guesses.items()]
    if task.new_head:
        return baselines
    try:
        numbers = read_row_scores(run, BASELINE)
    except EvaluationError:
        numbers = {}
    return [*baselines, RowScores("the pretrained model", candidate.eval_key, numbers)]


def _obstacle(candidate: RowScores, other: RowScores) -> str | None:
    """Why the two cannot be compared row by row, or None."""
    remedy = "evaluate both on the same data, or set registry.promote: always"
    if candidate.eval_key != other.eval_key:
        return (
            f"{other.name} was evaluated on other data (key {other.eval_key}, here {candidate.eval_key}), so the two "
            f"do not compare; {remedy}"
        )
    for one in (candidate, other):
        if len(one.numbers.get(ROW, ())) == 0:
            return f"there are no evaluation rows of {one.name}; {remedy}"
    if not np.array_equal(candidate.numbers[ROW], other.numbers[ROW]):
        return f"{candidate.name} and {other.name} were scored on different rows; {remedy}"
    return None


def _weigh(
    candidate: RowScores,
    draws: Array,
    other: RowScores,
    task: Task,
    metric: str,
    mode: Literal["max", "min"],
    seed: int,
) -> tuple[bool, str]:
    """Whether the candidate is better beyond the interval, and the numbers as a sentence."""
    first, second = _columns(candidate), _columns(other)
    interval = compare(first, second, task, metric, seed, len(draws), draws)
    better = interval.low > 0 if mode == "max" else interval.high < 0
    luck = share_by_luck(first, second, task, metric, mode, seed, len(draws)) if better else 1.0
    better = luck <= (1 - CONFIDENCE) / 2
    mine, theirs = value(first, task, metric), value(second, task, metric)
    if np.isnan(theirs):  # as a correlation is with equal answers, which are worth none
        low, high = percentiles(draws, len(candidate.numbers[ROW]))
        return mode == "min" or low > 0, (
            f"{metric} is {mine:.6g}, {CONFIDENCE:.0%} interval [{low:.4g}, {high:.4g}], and undefined for {other.name}"
        )
    return better, (
        f"{metric} {mine:.6g} {'beats' if better else 'does not beat'} {theirs:.6g} of {other.name}: "
        f"difference {interval.difference:+.4g}, {CONFIDENCE:.0%} interval [{interval.low:+.4g}, {interval.high:+.4g}] "
        f"over {len(draws):,} paired resamples of {len(candidate.numbers[ROW]):,} rows"
        + (f"; of two equally good models {luck:.1%} differ so by luck" if luck < 1 else "")
    )


def _columns(row_scores: RowScores) -> dict[str, Array]:
    return {name: values for name, values in row_scores.numbers.items() if name != ROW}
