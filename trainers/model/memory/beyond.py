"""What a rank holds whose state lies beyond the device: in host memory, or on the node's disk. Pure.

Of state on disk DeepSpeed 0.19 keeps in host memory: locked buffers of the optimizer's groups and of weights, another
that holds a group of whole weights on their way to disk, all gradients of the rank's part, parts of under 1 MiB, which
never go to disk, and at the first update the moments of a group, which have no buffer yet.
"""

from collections.abc import Iterable
from dataclasses import replace

from trainers.model.memory.held import Held, sharded
from trainers.model.memory.shape import ModelSize, StepShape

DISK_SUB_GROUP_ELEMENTS, DISK_GROUPS, DISK_WEIGHTS = 100_000_000, 4, 8
"""Of `zero3-nvme-offload`: what is updated at a time, and buffers in host memory of so many groups and weights."""
LEAST_ON_DISK, ALIGNED = 2**20, 256
"""Bytes below which a part stays in memory, and values in whose multiples gradients go to disk."""
SPARE = 4096
"""Values of a weight's buffer beside the largest part (`swap_files`)."""


def offloaded(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> Held:
    """The same with weights, gradients and optimizer in host memory; there every gradient has its place in fp32."""
    held = sharded(size, world_size, step, on_card)
    state = held.weights + held.optimizer + held.complete + 4 * size.trainable // world_size
    bucket = size.settings(3, world_size)["reduce_bucket_size"]
    early = 0.0 if on_card else max(0.0, 1 - bucket / max(size.trainable, 1))
    return replace(held, weights=0, optimizer=0, complete=0, before=0, update=0, host=state, early=early)


def on_disk(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> Held:
    """The same with that on the node's disk, and in host memory what is read or written, and the gradients. Nothing is
    read ahead, and a weight is let go as soon as its module has run."""
    held, width = offloaded(size, world_size, step, on_card), size.weight_bytes
    parts = [-(-each // world_size) for each in size.tensors] or [size.trainable // world_size]
    largest, group = max(parts), largest_group(parts, size.own_or("sub_group_size", DISK_SUB_GROUP_ELEMENTS))
    groups = size.own_or("offload_optimizer.buffer_count", DISK_GROUPS) * 4 * group
    weights = size.own_or("offload_param.buffer_size", largest + SPARE) * width
    weights *= size.own_or("offload_param.buffer_count", DISK_WEIGHTS)
    small = width * sum(each for each in parts if each * width < LEAST_ON_DISK)
    gradients = sharded(size, world_size, step, on_card).complete
    copied = width < 4 and step.accumulation == 1  # to fp32, and kept whole where only a part can go to disk
    loose = 4 * sum(each for each in parts if copied and (4 * each < LEAST_ON_DISK or each % ALIGNED))
    buffers, first = groups + weights + world_size * group * width + small + gradients, 8 * group
    persistent = size.settings(3, world_size)["stage3_param_persistence_threshold"]
    whole = width * sum(each for each in size.tensors if each <= persistent)
    gathered = width * max(size.tensors, default=0) if world_size > 1 or on_card else 0
    return replace(
        held, always=held.always + whole, gathered=gathered, ahead=0 if on_card else gathered,
        reduced=held.reduced + loose, update=loose + (0 if on_card else first),
        host=buffers + (first if on_card else 0),
        disk=(size.parameters * width + 16 * size.trainable) // world_size,
    )  # fmt: skip


def largest_group(parts: Iterable[int], limit: int) -> int:
    """Values of the largest of the groups that ZeRO-3 updates one after the other: each ends with the tensor that fills
    it.

    Args:
        parts: of each tensor, in the model's order, the values that one rank has.
    """
    largest = filled = 0
    for part in parts:
        filled += part
        largest = max(largest, filled)
        filled = 0 if filled >= limit else filled
    return largest
