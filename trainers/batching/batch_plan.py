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

    @property
    def per_rank(self) -> int:
        """Sequences of a rank in one step."""
        return self.global_batch_size // self.world_size

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
) -> BatchPlan:
    """Cut a global batch over ranks and micro-batches.

    Args:
        spread: whether a step may take more micro-batches than it must.

    Raises:
        JobError: where the global batch does not divide; names the sizes that would.
    """
    if global_batch_size % world_size:
        fitting = [size for size in range(1, global_batch_size + 1) if global_batch_size % size == 0]
        raise JobError(
            f"train.global_batch_size ({global_batch_size}) must be divisible by the world size ({world_size}); "
            f"scale.workers may be one of {fitting}"
        )
    per_rank = global_batch_size // world_size
    micro = _auto_size(per_rank, max_length) if micro_batch_size == "auto" else micro_batch_size
    if per_rank % micro:
        fitting = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        raise JobError(
            f"train.global_batch_size ({global_batch_size}) / world size ({world_size}) = {per_rank} must be divisible "
            f"by train.micro_batch_size ({micro}); it may be one of {fitting}, or auto"
        )
    return BatchPlan(global_batch_size, world_size, micro, per_rank // micro, spread)


def _auto_size(per_rank: int, max_length: int) -> int:
    wanted = max(AUTO_MICRO_BATCH_TOKENS // max_length, 1)
    return max(size for size in range(1, min(wanted, per_rank) + 1) if per_rank % size == 0)
