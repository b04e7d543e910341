"""Whether a new version becomes the champion. Pure: arrays in, a decision with its reason out.

By rule `if_better` a version is promoted only where it beats the present champion beyond the 95 % interval of a paired
bootstrap over the same evaluation rows; what cannot be compared is never promoted. Registries are `registry.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.registry.bootstrap import CONFIDENCE, RESAMPLES, compare
from trainers.errors import EvaluationError
from trainers.records import Array, Record
from trainers.run.row_scores import ROW
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
) -> Promotion:
    """Apply a promotion rule to a candidate and the present champion, if there is one."""
    if rule == "always":
        return Promotion(promote=True, reason="promoted by rule: registry.promote is always")
    if rule == "never":
        return Promotion(promote=False, reason="not promoted by rule: registry.promote is never")
    if champion is None:
        return Promotion(promote=True, reason="promoted: the model has no champion yet")
    obstacle = _obstacle(candidate, champion)
    if obstacle:
        return Promotion(promote=False, reason=f"not promoted: {obstacle}")
    return _weigh(candidate, champion, task, metric, mode, seed)


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
    candidate: RowScores, champion: RowScores, task: Task, metric: str, mode: Literal["max", "min"], seed: int
) -> Promotion:
    first, second = _columns(candidate), _columns(champion)
    known = task.metrics(first)
    if metric not in known:
        raise EvaluationError(f"evaluate.metric: the task knows no {metric!r}, only {', '.join(known)}")
    found = compare(first, second, task, metric, seed)
    better = found.low > 0 if mode == "max" else found.high < 0
    value, standing = known[metric], task.metrics(second)[metric]
    verdict = "beats" if better else "does not beat"
    reason = (
        f"{metric} {value:.6g} {verdict} {standing:.6g} of the champion ({champion.name}): difference "
        f"{found.difference:+.4g}, {CONFIDENCE:.0%} interval [{found.low:+.4g}, {found.high:+.4g}] over "
        f"{RESAMPLES:,} paired resamples of {len(candidate.numbers[ROW]):,} rows"
    )
    return Promotion(promote=better, reason=f"{'promoted' if better else 'not promoted'}: {reason}")


def _columns(row_scores: RowScores) -> dict[str, Array]:
    return {name: values for name, values in row_scores.numbers.items() if name != ROW}
