"""The batch arithmetic: global batch = world size x micro-batch x accumulation, constant at any world size.

That is the step whose sequences are all as long as the longest. Where they differ, shorter ones go together to as many
positions (`cutting`), so a step may take fewer micro-batches than that; with `spread` it may also take more.
"""

from dataclasses import dataclass
from typing import Literal

from trainers.errors import JobError

AUTO_MICRO_BATCH_TOKENS = 4096
"""micro_batch_size: auto takes the largest divisor whose padded tokens stay within this."""
SPREAD = 4
"""Micro-batches a step may take where one would do, so that long sequences do not pad short ones."""


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is cut up."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int
    """The most sequences of a micro-batch, if all are as long as the longest."""
    accumulation: int
    spread: bool = False
    """Whether a step may take more micro-batches than that."""
    sharing: int = 1
    """Ranks that have each sequence together."""

    @property
    def groups(self) -> int:
        """Ranks, or groups of them, that have sequences of their own."""
        return self.world_size // self.sharing

    @property
    def per_rank(self) -> int:
        """Sequences of a rank in one step, or of a group that shares them."""
        return self.global_batch_size // self.groups

    @property
    def rounds(self) -> int:
        """The most micro-batches of a rank in one step; divides `per_rank`."""
        if not self.spread or self.accumulation >= SPREAD:
            return self.accumulation
        return next(each for each in range(min(SPREAD, self.per_rank), self.per_rank + 1) if not self.per_rank % each)


def plan_batches(
    global_batch_size: int,
    micro_batch_size: int | Literal["auto"],
    world_size: int,
    max_length: int,
    spread: bool = False,
    sharing: int = 1,
) -> BatchPlan:
    """Cut a global batch over ranks and micro-batches.

    Args:
        spread: whether a step may take more micro-batches than it must.
        sharing: ranks that have each sequence together.

    Raises:
        JobError: where the global batch does not divide; names the sizes that would.
    """
    if world_size % sharing:
        raise JobError(
            f"scale.workers ({world_size}) must be a multiple of train.sequence_parallel ({sharing}), the workers that "
            f"share each sequence: {sharing}, {2 * sharing}, {3 * sharing} ..."
        )
    groups = world_size // sharing
    if global_batch_size % groups:
        fitting = [size * sharing for size in range(1, global_batch_size + 1) if global_batch_size % size == 0]
        advice = f"scale.workers may be one of {fitting}"
        if sharing == 1:
            raise JobError(
                f"train.global_batch_size ({global_batch_size}) must be divisible by the world size ({world_size}); "
                f"{advice}"
            )
        raise JobError(
            f"train.global_batch_size ({global_batch_size}) must be divisible by the {groups} groups of {sharing} "
            f"workers that share sequences; {advice}"
        )
    per_rank = global_batch_size // groups
    micro = _auto_size(per_rank, -(-max_length // sharing)) if micro_batch_size == "auto" else micro_batch_size
    if per_rank % micro:
        fitting = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        among = f"{groups} groups of workers" if sharing > 1 else f"world size ({world_size})"
        raise JobError(
            f"train.global_batch_size ({global_batch_size}) / {among} = {per_rank} must be divisible "
            f"by train.micro_batch_size ({micro}); it may be one of {fitting}, or auto"
        )
    return BatchPlan(global_batch_size, world_size, micro, per_rank // micro, spread, sharing)


def _auto_size(per_rank: int, max_length: int) -> int:
    wanted = max(AUTO_MICRO_BATCH_TOKENS // max_length, 1)
    return max(size for size in range(1, min(wanted, per_rank) + 1) if per_rank % size == 0)
