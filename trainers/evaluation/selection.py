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
        reasons = "; ".join(f"step {one.step}: {why_not(one, metric)}" for one in evaluations if one.step != BASELINE)
        raise EvaluationError(f"no checkpoint can be chosen: {reasons or 'none was evaluated'}")
    return best


def find_best(evaluations: Sequence[Evaluation], metric: str, mode: Mode) -> Evaluation | None:
    """As `select`; None if no checkpoint was evaluated."""
    usable = [one for one in evaluations if one.step != BASELINE and not why_not(one, metric)]
    sign = 1.0 if mode == "min" else -1.0
    return min(usable, key=lambda one: (sign * one.metrics[metric], one.step), default=None)


def why_not(evaluation: Evaluation, metric: str) -> str | None:
    """Why a checkpoint with this evaluation can never be the best; None if it can."""
    for name, margin in evaluation.guards.items() if evaluation.status == "done" else ():
        if not margin >= 0:
            value = evaluation.metrics.get(name)
            said = f"it has no {name}" if value is None else f"its {name} {value:.6g} misses the guard by {-margin:.4g}"
            return f"{said} (evaluate.guards)"
    return _unmeasured(evaluation, metric)


def _unmeasured(evaluation: Evaluation, metric: str) -> str | None:
    """Why this says nothing of a checkpoint; None if it does. NaN and infinity order nothing."""
    if evaluation.status == "failed":
        return evaluation.error or "failed"
    value = evaluation.metrics.get(metric)
    if value is None:
        return f"it has no {metric}"
    return None if math.isfinite(value) else f"its {metric} is {value}"


def next_evaluations(
    committed: Collection[int], evaluated: Collection[int], running: Collection[int], free_slots: int
) -> list[int]:
    """Committed steps to evaluate now, newest first."""
    waiting = sorted(set(committed) - set(evaluated) - set(running), reverse=True)
    return waiting[: max(free_slots, 0)]


def out_of_patience(evaluations: Sequence[Evaluation], metric: str, mode: Mode, patience: int) -> bool:
    """Whether the last `patience` evaluated checkpoints brought no new best."""
    best = find_best(evaluations, metric, mode)
    later = [one for one in evaluations if best is not None and one.step > best.step and not _unmeasured(one, metric)]
    return len(later) >= patience
