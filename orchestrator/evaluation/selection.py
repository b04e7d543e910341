"""Which checkpoint is best, which may be evaluated next, when to stop. Pure decisions over evaluation records."""

from collections.abc import Collection, Sequence

from trainers.errors import EvaluationError
from trainers.run.folder import Evaluation
from trainers.tasks import Mode

BASELINE = 0
"""The step that stands for the pretrained model as it came; compared with, never chosen."""


def select(evaluations: Sequence[Evaluation], metric: str, mode: Mode) -> Evaluation:
    """The best evaluated checkpoint; of equals the earliest. One whose evaluation failed is never chosen.

    Raises:
        EvaluationError: where none was evaluated.
    """
    usable = [one for one in evaluations if one.status == "done" and one.step != BASELINE and metric in one.metrics]
    if not usable:
        failed = "; ".join(f"step {one.step}: {one.error}" for one in evaluations if one.status == "failed")
        raise EvaluationError(f"no checkpoint was evaluated, so none can be chosen: {failed or 'there are none'}")
    sign = 1.0 if mode == "min" else -1.0
    return min(usable, key=lambda one: (sign * one.metrics[metric], one.step))


def next_evaluations(
    committed: Collection[int], evaluated: Collection[int], running: Collection[int], free_slots: int
) -> list[int]:
    """Committed steps to evaluate now, newest first."""
    waiting = sorted(set(committed) - set(evaluated) - set(running), reverse=True)
    return waiting[: max(free_slots, 0)]


def out_of_patience(evaluations: Sequence[Evaluation], metric: str, mode: Mode, patience: int) -> bool:
    """Whether the last `patience` evaluated checkpoints brought no new best."""
    usable = sorted((one for one in evaluations if one.status == "done" and one.step != BASELINE), key=lambda e: e.step)
    if len(usable) <= patience:
        return False
    best = select(usable, metric, mode)
    return sum(one.step > best.step for one in usable) >= patience
