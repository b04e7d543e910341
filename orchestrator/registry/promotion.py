"""Whether a new version becomes the champion. Begin at `decide`, which is pure.

By rule `if_better` a version is promoted only where it beats the present champion beyond the 95 % interval of a paired
bootstrap over the same evaluation rows; what cannot be compared is never promoted. Before that it must beat what
needs no training: chance, and the pretrained model where that was evaluated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from orchestrator.registry.bootstrap import CONFIDENCE, RESAMPLES, compare, resample
from trainers.errors import EvaluationError
from trainers.evaluation.selection import BASELINE
from trainers.records import Array, Record
from trainers.run.row_scores import ROW, read_row_scores
from trainers.storage import Folder
from trainers.tasks import Task

Rule = Literal["if_better", "always", "never"]


class Promotion(Record):
    """The decision, and why."""

    promote: bool
    reason: str


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
        baselines: what the candidate must beat as well, over the same rows: chance, the pretrained model.
        resamples: draws of the bootstrap.
    """
    if rule == "always":
        return Promotion(promote=True, reason="promoted by rule: registry.promote is always")
    if rule == "never":
        return Promotion(promote=False, reason="not promoted by rule: registry.promote is never")
    obstacle = champion and _obstacle(candidate, champion)
    if obstacle:
        return Promotion(promote=False, reason=f"not promoted: {obstacle}")
    standing = [replace(champion, name=f"the champion ({champion.name})")] if champion else []
    reason = "the model has no champion yet"
    if not baselines and not standing:
        return Promotion(promote=True, reason=f"promoted: {reason}")
    values = task.metrics(_columns(candidate))
    if metric not in values:
        raise EvaluationError(f"evaluate.metric: the task knows no {metric!r}, only {', '.join(values)}")
    draws = resample(_columns(candidate), task, metric, seed, resamples)
    for other in (*baselines, *standing):
        better, reason_of_pair = _weigh(candidate, draws, other, task, metric, mode, seed)
        if not better:
            return Promotion(promote=False, reason=f"not promoted: {reason_of_pair}")
        reason = reason_of_pair if champion else f"the model has no champion yet, and {reason_of_pair}"
    return Promotion(promote=True, reason=f"promoted: {reason}")


def chance_baselines(candidate: RowScores, seed: int) -> list[RowScores]:
    """What a classifier scores that knows no text: the majority class, and guesses by the labels' shares.

    Empty for tasks whose rows have no single label. The shares are those of the evaluation rows themselves, so both are
    as good as chance can be.
    """
    if not {"label", "prediction"} <= candidate.numbers.keys():
        return []
    label = candidate.numbers["label"]
    shares = np.bincount(label) / len(label)
    columns = {"loss_sum": -np.log(shares[label])}
    for name in candidate.numbers:
        if name.startswith("score_"):
            index = int(name.removeprefix("score_"))
            columns[name] = np.full(len(label), shares[index] if index < len(shares) else 0.0)
    guesses = np.random.default_rng(seed).choice(len(shares), len(label), p=shares)
    predictions = {"the majority class": np.full(len(label), shares.argmax()), "guesses by the labels' shares": guesses}
    return [
        RowScores(name, candidate.eval_key, {**candidate.numbers, **columns, "prediction": prediction})
        for name, prediction in predictions.items()
    ]


def pretrained_baseline(run: Folder, candidate: RowScores) -> list[RowScores]:
    """What the pretrained model scores; empty where it was not evaluated on the same rows, or has no head yet."""
    try:
        numbers = read_row_scores(run, BASELINE)
    except EvaluationError:
        return []
    alike = np.array_equal(numbers[ROW], candidate.numbers[ROW]) and numbers.keys() == candidate.numbers.keys()
    return [RowScores("the pretrained model", candidate.eval_key, numbers)] if alike else []


def baselines_of(run: Folder, candidate: RowScores, seed: int) -> list[RowScores]:
    """What needs no training, over the candidate's rows."""
    return [*chance_baselines(candidate, seed), *pretrained_baseline(run, candidate)]


def _obstacle(candidate: RowScores, champion: RowScores) -> str | None:
    """Why the two cannot be compared row by row, or None."""
    remedy = "evaluate both on the same data, or set registry.promote: always"
    if candidate.eval_key != champion.eval_key:
        return (
            f"the champion ({champion.name}) was evaluated on other data (key {champion.eval_key}, "
            f"here {candidate.eval_key}), so the two do not compare; {remedy}"
        )
    for one in (candidate, champion):
        if len(one.numbers.get(ROW, ())) == 0:
            return f"the evaluation rows of {one.name} cannot be read any more; {remedy}"
    if not np.array_equal(candidate.numbers[ROW], champion.numbers[ROW]):
        return f"{candidate.name} and the champion ({champion.name}) were scored on different rows; {remedy}"
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
    mine, theirs = task.metric_value(metric, first), task.metric_value(metric, second)
    if np.isnan(theirs):
        return True, f"{metric} is {mine:.6g}, and undefined for {other.name}, which scores these rows alike"
    return better, (
        f"{metric} {mine:.6g} {'beats' if better else 'does not beat'} {theirs:.6g} of {other.name}: "
        f"difference {interval.difference:+.4g}, {CONFIDENCE:.0%} interval [{interval.low:+.4g}, {interval.high:+.4g}] "
        f"over {len(draws):,} paired resamples of {len(candidate.numbers[ROW]):,} rows"
    )


def _columns(row_scores: RowScores) -> dict[str, Array]:
    return {name: values for name, values in row_scores.numbers.items() if name != ROW}
