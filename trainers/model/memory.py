"""What a rank needs of memory, by the way the state is kept. Pure; begin at `needs`. Sizes come from `model_size`.

A step has moments that are full of different things: of activations when the layers have run, of logits at the loss, of
copies of gradients when they are reduced, of fp32 gradients at the update. What counts is the fullest.
"""

from dataclasses import dataclass, replace

from trainers.model.zero_settings import zero_settings
from trainers.tasks.losses import CARD_CHUNK_BYTES, CHUNK_BYTES

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""CUDA context, libraries' workspaces and what collectives hold."""
MARGIN = 0.08
"""Share of activations and state that an allocator loses to fragments."""
CPU_IMPORT_BYTES, CPU_RESERVE_BYTES = 560 * 2**20, 88 * 2**20
"""What a rank on a CPU takes besides tensors: imports; then code that is read in as it first runs, workspaces of
kernels and of gloo. Measured with a model of 0.3 million parameters."""
CPU_MARGIN, GIVE_BACK_BYTES = 0.05, 64 * 2**10
"""The same as MARGIN, where the C library gives freed tensors of so many bytes back at once."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Of a partition that ZeRO-3 updates at a time; DeepSpeed's default."""
PLAIN_BUCKET_BYTES = 256 * 2**20
"""Gradients that `PlainEngine` reduces at a time."""
SAVED_BYTES = 12
"""A parameter's weight and moments in fp32, as checkpoints hold them."""
DISK_SUB_GROUP_ELEMENTS, DISK_GROUPS, DISK_WEIGHTS = 100_000_000, 4, 8
"""Of `zero3-nvme-offload`: what is updated at a time, and buffers in host memory of so many groups and weights."""


@dataclass(frozen=True)
class StepShape:
    """How a rank cuts its step."""

    micro_batch_size: int
    accumulation: int = 1
    """Micro-batches a step; stages 2 and 3 sum the gradients of several in fp32 (`derive_config`)."""
    checkpoint_every: int = 0
    """Of so many layers one is computed again in the backward pass; 0: none."""
    offload: bool = False
    """Whether what such layers keep lies in host memory."""


@dataclass(frozen=True)
class ModelSize:
    """Of one model under one job; a sequence is one of `length` positions."""

    parameters: int
    trainable: int
    weight_bytes: int
    """Bytes of a working weight."""
    sequence_bytes: int
    """What one sequence keeps for the backward pass where no layer is computed again; logits apart."""
    outside_bytes: int = 0
    """The part of it that no layer keeps: embeddings, the last norm."""
    passing_bytes: int = 0
    """What passes through a layer's forward and backward pass at the most, for one sequence, beside what is kept."""
    length: int = 0
    width: int = 0
    """Of a hidden state."""
    vocabulary: int = 0
    """Columns of the logits; 0 for heads whose outputs do not count."""
    targets: float = 1.0
    """Share of the positions whose loss is computed."""
    chunked: bool = False
    """Whether the loss is computed in chunks (`losses.chunked`)."""
    layers: int = 1
    tensors: tuple[int, ...] = ()
    """Elements of each tensor,"""
    largest_layer: int = 0
    """and of the largest layer."""
    late_parameters: int = 0
    """Trained ones of the first layer and the embeddings, whose gradients come last."""
    checkpoints: bool = True
    """Whether the model's class can compute layers again."""
    saves_frozen: bool = True
    """Whether checkpoints hold what does not train."""

    def settings(self, stage: int, world_size: int) -> dict[str, int]:
        """Elements of buckets and of gathered weights, as `zero_settings` makes them."""
        return {name: int(each.value) for name, each in
                zero_settings(stage, self.tensors, self.largest_layer, world_size).items()}  # fmt: skip

    @property
    def saved_frozen_bytes(self) -> int:
        """Of frozen weights in a checkpoint, which rank 0 holds, in fp32."""
        return 4 * (self.parameters - self.trainable) if self.saves_frozen else 0

    @property
    def input_bytes(self) -> int:
        """Of one layer, for one sequence."""
        return self.length * self.width * self.weight_bytes

    @property
    def layer_bytes(self) -> int:
        """What a layer keeps of one sequence."""
        return (self.sequence_bytes - self.outside_bytes) // self.layers

    def layers_again(self, step: StepShape) -> int:
        return -(-self.layers // step.checkpoint_every) if step.checkpoint_every else 0

    def inputs_bytes(self, step: StepShape) -> int:
        """What the layers that are computed again keep of a micro-batch."""
        return self.layers_again(step) * self.input_bytes * step.micro_batch_size

    def kept_bytes(self, step: StepShape) -> int:
        """What a micro-batch keeps on the device from its forward to its backward pass, logits apart."""
        kept = self.sequence_bytes * step.micro_batch_size
        again = self.layers_again(step) * self.layer_bytes * step.micro_batch_size
        return min(kept, kept - again + (0 if step.offload else self.inputs_bytes(step)))

    def again_bytes(self, step: StepShape) -> int:
        """What passes through a layer of the backward pass; of one that is computed again all that it keeps."""
        return (bool(step.checkpoint_every) * self.layer_bytes + self.passing_bytes) * step.micro_batch_size

    def loss_bytes(self, step: StepShape, on_card: bool) -> int:
        """Logits, their fp32 copy and its logarithms, or three fp32 gradients in the backward pass; in chunks, a chunk
        of logits and the head's gradient."""
        positions = step.micro_batch_size * self.length
        if not self.chunked:
            each = max(self.weight_bytes + 8 * self.targets, 12 * self.targets)
            return int(positions * self.vocabulary * each)
        logits = int(4 * positions * self.targets * self.vocabulary)
        chunk = CARD_CHUNK_BYTES // 2 if on_card else 2 * min(logits, CHUNK_BYTES)
        gradient = self.vocabulary * self.width * (4 if self.weight_bytes == 4 else 4 + self.weight_bytes)
        return chunk + gradient + int(2 * self.input_bytes * step.micro_batch_size * self.targets)


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs of a rank at the fullest moment of a step."""

    way: str
    moment: str
    weights: int
    gradients: int
    optimizer: int
    """fp32 masters and the two moments."""
    working: int
    """What gathers, reductions and the update hold for a while."""
    activations: int
    logits: int
    """Logits over a vocabulary, or what the loss holds in their place."""
    staging: int
    """Of host memory: what checkpoints are copied to, from the start of a run to its end."""
    host: int
    """State that is kept in host memory, and what layers keep there; staging apart."""
    disk: int
    """State that is kept on the node's disk."""
    state: int
    """Weights, all gradients and the optimizer, on the device."""
    on_card: bool = True

    @property
    def counted(self) -> int:
        """What tensors take of the device at that moment; on a CPU all is in one memory."""
        tensors = self.weights + self.gradients + self.optimizer + self.working + self.activations + self.logits
        return tensors if self.on_card else tensors + self.staging + self.host

    @property
    def margin(self) -> int:
        """For fragments, and what is no tensor."""
        share, more = (MARGIN, RESERVE_BYTES) if self.on_card else (CPU_MARGIN, CPU_IMPORT_BYTES + CPU_RESERVE_BYTES)
        return int(self.counted * share) + more

    @property
    def device(self) -> int:
        """Of the device in all; on a CPU of the memory that a rank has to itself."""
        return self.counted + self.margin


@dataclass(frozen=True)
class _Held:
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
    host: int = 0
    disk: int = 0


def needs(size: ModelSize, world_size: int, step: StepShape, on_card: bool = True) -> tuple[Need, ...]:
    """What each way needs, the cheapest way first.

    Args:
        on_card: ranks compute on GPUs; else on CPUs, where a buffer takes what was written to it, and gloo reduces in a
            copy.
    """
    ways = {
        "zero0": _plain(size, world_size, step),
        "zero1": _parted(size, world_size, step, on_card, 1),
        "zero2": _parted(size, world_size, step, on_card, 2),
        "zero3": _sharded(size, world_size, step, on_card),
        "zero3-cpu-offload": _offloaded(size, world_size, step, on_card),
        "zero3-nvme-offload": _on_disk(size, world_size, step, on_card),
    }
    kept, logits, again = size.kept_bytes(step), size.loss_bytes(step, on_card), size.again_bytes(step)
    on_host = size.inputs_bytes(step) if step.offload else 0
    saved = SAVED_BYTES * size.trainable // world_size + size.saved_frozen_bytes
    found = []
    for way, held in ways.items():
        moments = {  # gradients, working memory, activations, logits
            "layers": (held.before, held.always + held.gathered + held.ahead, kept, 0),
            "loss": (held.before, held.always + held.gathered, kept, logits),
            "backward": (held.before, held.always + held.buckets + held.gathered, kept + again, 0),
            "first layer": (held.before, held.always + held.buckets + held.arriving, again, 0),
            "reduction": (held.before, held.always + held.buckets + held.reduced, 0, 0),
            "update": (0, held.always + held.update, 0, 0),
        }
        moment = max(moments, key=lambda name: sum(moments[name]))
        gradients, working, activations, loss = moments[moment]
        state = held.weights + held.optimizer + held.complete
        staging = 0 if held.host else saved  # offloaded state is written from where it lies
        found.append(Need(way, moment, held.weights, gradients, held.optimizer, working, activations, loss, staging,
                          held.host + on_host, held.disk, state, on_card))  # fmt: skip
    return tuple(found)


def _plain(size: ModelSize, world_size: int, step: StepShape) -> _Held:
    """Everything on every rank (`PlainEngine`); weights in fp32 are their own masters."""
    wide, halves, several = 4 * size.trainable, size.weight_bytes < 4, step.accumulation > 1
    bucket = min(PLAIN_BUCKET_BYTES, wide) if world_size > 1 else 0
    return _Held(
        size.parameters * size.weight_bytes, 2 * wide + halves * wide, wide, before=wide if several else 0,
        arriving=0 if several and not halves else (size.trainable - size.late_parameters) * size.weight_bytes,
        reduced=size.trainable * size.weight_bytes if several and halves else 0 if several else wide,
        update=wide + bucket,
    )  # fmt: skip


def _parted(size: ModelSize, world_size: int, step: StepShape, on_card: bool, stage: int) -> _Held:
    """Stages 1 and 2: gradients pass through one bucket, on GPUs two, and a copy sorted by rank."""
    trainable, width, several = size.trainable, size.weight_bytes, step.accumulation > 1
    bucket = size.settings(stage, world_size)["reduce_bucket_size"]
    gradients, filled = trainable * width, min(bucket, trainable) * width
    mine = trainable * (4 if several and width < 4 else width) // world_size
    return _Held(
        size.parameters * width, 12 * trainable // world_size, gradients if stage == 1 else mine,
        before=(gradients if stage == 1 else mine) if several else 0,
        buckets=2 * bucket * width if on_card else 0,
        arriving=0 if on_card else min(bucket, (size.trainable - size.late_parameters)) * width,
        reduced=filled + gradients // world_size if on_card else (1 if stage == 1 and several else 2) * filled,
        update=(gradients + 4 * trainable + (gradients if width < 4 else 0)) // world_size,
    )  # fmt: skip


def _sharded(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> _Held:
    """Stage 3: the bucket and the sums of gradients are there from the first step to the last."""
    trainable, width, shared = size.trainable, size.weight_bytes, world_size > 1
    settings = size.settings(3, world_size)
    bucket, live = settings["reduce_bucket_size"], settings["stage3_max_live_parameters"]
    filled = min(bucket, trainable) * width
    mine = trainable * (4 if step.accumulation > 1 and width < 4 else width) // world_size
    group = min(SUB_GROUP_ELEMENTS, trainable // world_size)
    return _Held(
        size.parameters * width // world_size, 12 * trainable // world_size, mine, before=mine,
        always=bucket * width if on_card else filled,
        gathered=min(live, size.parameters) * width if shared or on_card else 0,
        ahead=min(settings["stage3_prefetch_bucket_size"], size.parameters) * width if shared else 0,
        reduced=filled if on_card else 2 * filled,
        update=mine + group * (4 + (width if width < 4 else 0)),
    )  # fmt: skip


def _offloaded(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> _Held:
    """The same with weights, gradients and optimizer in host memory; there every gradient has its place in fp32."""
    held = _sharded(size, world_size, step, on_card)
    state = held.weights + held.optimizer + held.complete + 4 * size.trainable // world_size
    return replace(held, weights=0, optimizer=0, complete=0, before=0, update=0, host=state)


def _on_disk(size: ModelSize, world_size: int, step: StepShape, on_card: bool) -> _Held:
    """The same with that on the node's disk, and in host memory what is read or written. Nothing is read ahead."""
    held, largest = _offloaded(size, world_size, step, on_card), -(-max(size.tensors, default=0) // world_size)
    group = min(DISK_SUB_GROUP_ELEMENTS, size.trainable // world_size) + largest
    state = (size.parameters * size.weight_bytes + 16 * size.trainable) // world_size
    buffers = DISK_GROUPS * 4 * group + DISK_WEIGHTS * largest * size.weight_bytes
    return replace(held, ahead=0, host=buffers, disk=state)
