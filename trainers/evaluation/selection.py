"""Which checkpoint is best, which is evaluated next, when to stop. Pure decisions over evaluation records."""

import math
from collections.abc import Collection, Sequence

from trainers.errors import EvaluationError
from trainers.run.folder import Evaluation
from trainers.tasks import Mode

BASELINE = 0
"""The step that stands for the pretrained model; compared with, never chosen."""


def select(evaluations: Sequence[Evaluation], metric: str, mode: Mode) -> Evaluation:
    """The best evaluated checkpoint; ties: the earliest step. One whose evaluation failed is never chosen.

    Raises:
        EvaluationError: no checkpoint was evaluated.
    """
    best = find_best(evaluations, metric, mode)
    if best is None:
        failed = "; ".join(f"step {one.step}: {one.error}" for one in evaluations if one.status == "failed")
        raise EvaluationError(f"no checkpoint was evaluated, so none can be chosen: {failed or 'there are none'}")
    return best


def find_best(evaluations: Sequence[Evaluation], metric: str, mode: Mode) -> Evaluation | None:
    """As `select`; None if no checkpoint was evaluated."""
    usable = [one for one in evaluations if one.step != BASELINE and has_value(one, metric)]
    sign = 1.0 if mode == "min" else -1.0
    return min(usable, key=lambda one: (sign * one.metrics[metric], one.step), default=None)


def has_value(evaluation: Evaluation, metric: str) -> bool:
    """Whether an evaluation ended with a finite value of a metric: NaN and infinity compare with nothing."""
    return evaluation.status == "done" and math.isfinite(evaluation.metrics.get(metric, math.nan))


def next_evaluations(
    committed: Collection[int], evaluated: Collection[int], running: Collection[int], free_slots: int
) -> list[int]:
    """Committed steps to evaluate now, newest first."""
    waiting = sorted(set(committed) - set(evaluated) - set(running), reverse=True)
    return waiting[: max(free_slots, 0)]


def out_of_patience(evaluations: Sequence[Evaluation], metric: str, mode: Mode, patience: int) -> bool:
    """Whether the last `patience` evaluated checkpoints brought no new best."""
    best = find_best(evaluations, metric, mode)
    later = [one for one in evaluations if best is not None and one.step > best.step and has_value(one, metric)]
    return len(later) >= patience
