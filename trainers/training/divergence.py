"""When a loss is beyond belief, and which steps are therefore left out: rolled back to the last commit, then skipped.

A skipped step trains on nothing; its number passes, so that the order of the data and the learning rate of every other
step stay what they were. `skipped.json` in the run folder outlives the processes.
"""

import math
from collections.abc import Sequence
from typing import Any

from trainers.errors import TrainingError
from trainers.patience import retrying
from trainers.records import Record
from trainers.storage import Folder

SKIPPED = "skipped.json"
ROLLBACKS = 3
"""Rollbacks after which a run ends: its data or its settings are at fault, not a stray batch."""
BELIEVED = 20
"""Losses that must be known before one can be called a spike."""


class Diverged(Exception):
    """A step whose loss or gradient must not stand. Raised on every rank alike: the loss is shared."""

    def __init__(self, step: int, loss: float, reason: str) -> None:
        super().__init__(f"step {step + 1}: {reason}")
        self.step, self.loss, self.reason = step, loss, reason


class SkippedStep(Record):
    """One step that is left out."""

    step: int
    """Counted from 0."""
    loss: str
    """As it was; text, because JSON has no NaN."""
    reason: str
    sequences: tuple[int, ...]
    """Packs of the step, by their number in the index."""
    rows: tuple[tuple[str, int], ...]
    """(file, row) of every input row in them."""


class SkippedSteps(Record):
    """skipped.json."""

    steps: tuple[SkippedStep, ...] = ()

    @property
    def numbers(self) -> frozenset[int]:
        """The steps, counted from 0."""
        return frozenset(one.step for one in self.steps)


def divergence(loss: float, grad_norm: float, recent: Sequence[float], spike_factor: float | None) -> str | None:
    """What is wrong with a step, or None.

    Args:
        recent: losses of the last steps; the largest of them is what this batch is measured against, so that data
            whose loss jumps by itself is left alone.
        spike_factor: how many times that a loss may be; None asks for finite numbers only.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if spike_factor is not None and len(recent) >= BELIEVED and loss > spike_factor * max(recent):
        return (
            f"the loss is {loss:.4g}, over train.spike_factor ({spike_factor:g}) times the largest of the last "
            f"{len(recent)} steps ({max(recent):.4g})"
        )
    return None


def read_skipped(run: Folder) -> SkippedSteps:
    """Steps that earlier attempts rolled back. For rank 0, which tells the others: hosts may see it late."""
    retrying(run.refresh, f"looking at {run}")
    if SKIPPED not in retrying(run.list, f"listing {run}"):
        return SkippedSteps()
    return SkippedSteps.model_validate_json(retrying(lambda: run.read_bytes(SKIPPED), f"reading {SKIPPED} of {run}"))


def write_skipped(run: Folder, skipped: SkippedSteps) -> None:
    """Commit the list."""
    run.write_bytes(SKIPPED, skipped.model_dump_json(indent=1).encode())


def add_skipped(skipped: SkippedSteps, new: SkippedStep) -> SkippedSteps:
    """The list with one more.

    Raises:
        TrainingError: where that is one too many.
    """
    steps = (*skipped.steps, new)
    if len(steps) > ROLLBACKS:
        told = "; ".join(f"step {one.step + 1}: {one.reason}" for one in steps)
        raise TrainingError(
            f"the loss diverged {len(steps)} times, and after {ROLLBACKS} rollbacks a run ends ({told}). Lower "
            "train.learning_rate, lengthen the warm-up, clip harder (train.max_grad_norm), or look at the rows: "
            f"{', '.join(f'{file} row {row}' for file, row in new.rows[:3])}"
        )
    return SkippedSteps(steps=steps)


def skipped_step(error: Diverged, sequences: Sequence[int], origins: Sequence[Any]) -> SkippedStep:
    """The record of a step that diverged."""
    rows = sorted({(str(file), int(row)) for file, row, _ in origins})
    return SkippedStep(
        step=error.step,
        loss=repr(error.loss),
        reason=error.reason,
        sequences=tuple(int(one) for one in sequences),
        rows=tuple(rows),
    )
