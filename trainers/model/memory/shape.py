"""Sizes of one model under one job, and how a step is cut: what of them a micro-batch brings. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainers.model.zero_settings import zero_settings
from trainers.tasks.losses import CARD_CHUNK_BYTES, CHUNK_BYTES

EXCHANGED = 3
"""Copies of a layer's queries beside the one that is kept, where ranks exchange heads: as sent, as received, in order.
"""


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
    tiled: bool = False
    """Whether feed-forward layers are computed in tiles."""


@dataclass(frozen=True)
class ModelSize:
    """Of one model under one job; a sequence is one of `length` positions, where ranks share it the part of one."""

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
    tiled_layer_bytes: int = 0
    """What a layer keeps of one sequence where its feed-forward part is computed in tiles; 0 where it cannot be, or a
    sequence is one tile,"""
    tiled_passing_bytes: int = 0
    """what passes through it beside,"""
    tile_bytes: int = 0
    """and what a tile takes, however long the sequence."""
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
    sharing: int = 1
    """Ranks that share each sequence."""
    heads: int = 0
    """Of queries, which ranks that share a sequence divide among themselves; 0 where they cannot share it."""
    query_bytes: int = 0
    """Of a layer's queries, for one sequence,"""
    key_bytes: int = 0
    """and of its keys."""
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
    teacher_bytes: int = 0
    """Weights of a teacher, which every rank holds whole,"""
    teacher_passing_bytes: int = 0
    """and what one sequence holds at the most on its way through it."""
    own: Mapping[str, int] = field(default_factory=dict)
    """What a DeepSpeed file of the job's own says, as `own_settings` gives it."""

    def settings(self, stage: int, world_size: int) -> dict[str, int]:
        """Elements of buckets and of gathered weights, as `zero_settings` makes them, or the job's own."""
        made = zero_settings(stage, self.tensors, self.largest_layer, world_size)
        return {name: self.own_or(name, int(each.value)) for name, each in made.items()}

    def own_or(self, name: str, value: int) -> int:
        """What the job's own file says, by either of DeepSpeed's names, else `value`."""
        return self.own.get(name, self.own.get(name.removeprefix("stage3_"), value))

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

    @property
    def exchanged_bytes(self) -> int:
        """What ranks that share a sequence exchange of it in a layer's forward pass: query, key, value and output."""
        return 2 * (self.query_bytes + self.key_bytes) if self.sharing > 1 else 0

    def shared(self, times: int) -> "ModelSize":
        """The same where so many times as many ranks share each sequence: all grows with positions in proportion."""
        parts = ("length", "sequence_bytes", "outside_bytes", "passing_bytes", "tiled_layer_bytes",
                 "tiled_passing_bytes", "query_bytes", "key_bytes", "teacher_passing_bytes")  # fmt: skip
        return replace(self, sharing=self.sharing * times, **{name: -(-getattr(self, name) // times) for name in parts})

    def layers_again(self, step: StepShape) -> int:
        return -(-self.layers // step.checkpoint_every) if step.checkpoint_every else 0

    def inputs_bytes(self, step: StepShape) -> int:
        """What the layers that are computed again keep of a micro-batch."""
        return self.layers_again(step) * self.input_bytes * step.micro_batch_size

    def kept_bytes(self, step: StepShape) -> int:
        """What a micro-batch keeps on the device from its forward to its backward pass, logits apart."""
        layer = self.layer_kept(step)
        kept = (self.outside_bytes + self.layers * layer) * step.micro_batch_size
        again = self.layers_again(step) * layer * step.micro_batch_size
        return min(kept, kept - again + (0 if step.offload else self.inputs_bytes(step)))

    def layer_kept(self, step: StepShape) -> int:
        """What a layer keeps of one sequence where it is not computed again."""
        return self.tiled_layer_bytes if step.tiled and self.tiled_layer_bytes else self.layer_bytes

    def again_bytes(self, step: StepShape) -> int:
        """What passes through a layer of the backward pass; of one that is computed again all that it keeps."""
        tiled = step.tiled and self.tiled_layer_bytes > 0
        passing = self.tiled_passing_bytes if tiled else self.passing_bytes
        exchanged = EXCHANGED * self.query_bytes if self.sharing > 1 else 0
        each = bool(step.checkpoint_every) * self.layer_kept(step) + passing + exchanged
        return each * step.micro_batch_size + (self.tile_bytes if tiled else 0)

    def loss_bytes(self, step: StepShape, on_card: bool) -> int:
        """Logits, their fp32 copy and its logarithms, or three fp32 gradients in the backward pass; in chunks, a chunk
        of logits and the head's gradient. With a teacher its logits and theirs too."""
        positions, taught = step.micro_batch_size * self.length, self.teacher_bytes > 0
        passing = self.teacher_passing_bytes * step.micro_batch_size
        if not self.chunked:
            each = max(self.weight_bytes + 8 * self.targets, 12 * self.targets)
            each += taught * (self.weight_bytes + 8 * self.targets)
            return int(positions * self.vocabulary * each) + passing
        logits = int(4 * positions * self.targets * self.vocabulary)
        halves = 0 if self.weight_bytes == 4 else min(logits, CHUNK_BYTES) // 2  # as they come, and as they go on
        chunk = CARD_CHUNK_BYTES // 2 if on_card and not taught else min(logits, CHUNK_BYTES) + halves
        chunk += taught * (3 * min(logits, CHUNK_BYTES) + halves)  # its own, and the logarithms of both
        gradient = self.vocabulary * self.width * (4 if self.weight_bytes == 4 else 4 + self.weight_bytes)
        return passing + chunk + gradient + int(2 * self.input_bytes * step.micro_batch_size * self.targets)
