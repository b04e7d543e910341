"""What a rank holds whose state lies on the device, beside what a micro-batch brings. Pure."""

from dataclasses import dataclass

from trainers.model.memory.shape import ModelSize, StepShape

SUB_GROUP_ELEMENTS = 1_000_000_000
"""Of a partition that ZeRO-3 updates at a time; DeepSpeed's default."""
PLAIN_BUCKET_BYTES = 256 * 2**20
"""Gradients that `PlainEngine` reduces at a time."""


@dataclass(frozen=True)
class Held:
    """What one way holds, in bytes, beside what a micro-batch brings."""

    weights: int
    optimizer: int
    complete: int
    """Gradients once all are there."""
    before: int = 0
    """Gradients while layers compute: of micro-batches before, or always."""
    always: int = 0
    """Buffers that stay from step to step."""
    buckets: int = 0
    """Buffers that stay through a backward pass."""
    gathered: int = 0
    """Weights that are gathered while layers compute."""
    ahead: int = 0
    """Weights on their way beside these, until the last layer has run."""
    arriving: int = 0
    """Gradients that are there when the backward pass comes to the first layer, beside `before` and `buckets`."""
    reduced: int = 0
    """Gradients and copies of them at the end of the backward pass, beside `before` and `buckets`."""
    update: int = 0
    """Gradients and their copies at the update, beside `always`."""
    early: float = 0.0
    """Share of the activations and gathered weights that is still there when the first gradients are reduced."""
    host: int = 0
    disk: int = 0


def plain(size: ModelSize, world_size: int, step: StepShape) -> Held:
    """Everything on every rank (`PlainEngine`); weights in fp32 are their own masters."""
    wide, halves, several = 4 * size.trainable, size.weight_bytes < 4, step.accumulation > 1
    bucket = min(PLAIN_BUCKET_BYTES, wide) if world_size > 1 else 0
    return Held(
        size.parameters * size.weight_bytes, 2 * wide + halves * wide, wide, before=wide if several else 0,
        arriving=0 if several and not halves else (size.trainable - size.late_parameters) * size.weight_bytes,
        reduced=size.trainable * size.weight_bytes if several and halves else 0 if several else wide,
        update=wide + bucket,
    )  # fmt: skip


def parted(size: ModelSize, world_size: int, step: StepShape, on_card: bool, stage: int) -> Held:
    """Stages 1 and 2: gradients pass through one bucket, on GPUs two, and a copy sorted by rank."""
    trainable, width, several = size.trainable, size.weight_bytes, step.accumulation > 1
    bucket = size.settings(stage, world_size)["reduce_bucket_size"]
    gradients, filled = trainable * width, min(bucket, trainable) * width
    mine = trainable * (4 if several and width < 4 else width) // world_size
    return Held(
        size.parameters * width, 12 * trainable // world_size, gradients if stage == 1 else mine,
        before=(gradients if stage == 1 else mine) if several else 0,
        buckets=2 * bucket * width if on_card else 0,
        arriving=0 if on_card else min(bucket, (size.trainable - size.late_parameters)) * width,
        reduced=filled + gradients // world_size if on_card else (1 if stage == 1 and several else 2) * filled,
        update=(gradients + 4 * trainable + (gradients if width < 4 else 0)) // world_size,
    )  # fmt: skip


def sharded(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> Held:
    """Stage 3: the bucket and the sums of gradients are there from the first step to the last."""
    trainable, width, shared = size.trainable, size.weight_bytes, world_size > 1
    settings = size.settings(3, world_size)
    bucket, live = settings["reduce_bucket_size"], settings["stage3_max_live_parameters"]
    filled = min(bucket, trainable) * width
    mine = trainable * (4 if step.accumulation > 1 and width < 4 else width) // world_size
    group = min(SUB_GROUP_ELEMENTS, trainable // world_size)
    return Held(
        size.parameters * width // world_size, 12 * trainable // world_size, mine, before=mine,
        always=bucket * width if on_card else filled,
        gathered=min(live, size.parameters) * width if shared or on_card else 0,
        ahead=min(settings["stage3_prefetch_bucket_size"], size.parameters) * width if shared else 0,
        reduced=filled if on_card else 2 * filled,
        update=mine + group * (4 + (width if width < 4 else 0)),
    )  # fmt: skip
