"""What a step needs of each rank's memory, by the way the state is kept. Begin at `needs`, which is pure.

Activations are not guessed: `measure_activations` runs the model's own forward pass on fake tensors, which have shapes
and no values, and sums what autograd keeps.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trainers.job.schema import Job
from trainers.model.zero_settings import sizes_of, zero_settings

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""CUDA context, libraries' workspaces and what collectives hold."""
MARGIN = 0.08
"""Share of activations and state that an allocator loses to fragments."""
UPDATE_ELEMENTS = 500_000_000
"""Of a partition, whose gradients are in fp32 while it is updated."""

HEAD = "lm_head.weight"


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
    """Of one model under one job. Sequences are of `data.max_length`."""

    parameters: int
    trainable: int
    weight_bytes: int
    """Bytes of a working weight."""
    sequence_bytes: int
    """What one sequence keeps for the backward pass where no layer is computed again; logits apart."""
    logits_bytes: int = 0
    """Logits of one sequence and their copies, where they are held whole."""
    once_bytes: int = 0
    """What the loss holds whatever the micro-batch: a chunk of logits, the head's gradient."""
    layers: int = 1
    input_bytes: int = 0
    """Of one layer, for one sequence."""
    tensors: tuple[int, ...] = ()
    """Elements of each tensor,"""
    largest_layer: int = 0
    """and of the largest layer."""
    checkpoints: bool = True
    """Whether the model's class can compute layers again."""

    def kept_bytes(self, step: StepShape) -> int:
        """What a micro-batch keeps for the backward pass, logits apart."""
        kept = self.sequence_bytes
        if every := step.checkpoint_every:
            inputs = 0 if step.offload else self.layers * self.input_bytes // every
            kept = min(kept, kept - kept // every + kept // self.layers + inputs)  # one layer is computed at a time
        return kept * step.micro_batch_size


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs of a rank."""

    way: str
    weights: int
    gradients: int
    optimizer: int
    """fp32 masters and the two moments."""
    working: int
    """What gathers, reductions, the update and the loss hold for a while."""
    activations: int
    logits: int
    host: int
    """State that is kept in host memory, and what layers keep there."""

    @property
    def state(self) -> int:
        """What stays on the device from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """Of the device, margin and reserve included."""
        return int((self.state + self.working + self.activations + self.logits) * (1 + MARGIN)) + RESERVE_BYTES


def needs(size: ModelSize, world_size: int, step: StepShape) -> tuple[Need, ...]:
    """What each way needs, the cheapest way first."""
    total, trainable, width = size.parameters, size.trainable, size.weight_bytes
    weights, gradients = total * width, trainable * width
    summed = trainable * (4 if step.accumulation > 1 else width) // world_size
    masters = 0 if width == 4 else 4 * trainable
    adam = masters + 8 * trainable
    mine = adam // world_size
    update = min(masters, 4 * UPDATE_ELEMENTS) // world_size  # a partition's gradients in fp32
    settings = zero_settings(3, size.tensors, size.largest_layer, world_size)
    bucket = settings["reduce_bucket_size"].value * width
    live = min(settings["stage3_max_live_parameters"].value, total) * width
    state = {  # weights, gradients, optimizer, working memory, host
        "zero0": (weights, gradients, adam, masters, 0),
        "zero1": (weights, gradients, mine, update + bucket, 0),
        "zero2": (weights, summed, mine, update + 2 * bucket, 0),
        "zero3": (weights // world_size, summed, mine, update + live + bucket, 0),
        "zero3-cpu-offload": (0, summed, 0, live + bucket, weights // world_size + mine + update),
    }
    kept, logits = size.kept_bytes(step), size.logits_bytes * step.micro_batch_size
    inputs = size.layers * size.input_bytes // step.checkpoint_every * step.micro_batch_size if step.offload else 0
    return tuple(
        Need(way, held, summed_up, moments, working + size.once_bytes, kept, logits, host + inputs)
        for way, (held, summed_up, moments, working, host) in state.items()
    )


def measure_size(job: Job, model_path: str) -> ModelSize:
    """Sizes of a job's model, from its configuration alone."""
    import torch

    from trainers.tasks.losses.chunked import CARD_CHUNK_BYTES, CHUNK_BYTES, LEAST_VOCABULARY

    dtype, length = getattr(torch, job.model.dtype), job.data.max_length
    width = dtype.itemsize
    kept, model, config = measure_activations(model_path, length, dtype, job.model.trust_remote_code)
    text = config.get_text_config()
    vocabulary, row = text.vocab_size if _predicts_tokens(job) else 0, length * text.hidden_size * width
    chunked, chunk = vocabulary >= LEAST_VOCABULARY, max(3 * CHUNK_BYTES, CARD_CHUNK_BYTES // 2)
    head = vocabulary * text.hidden_size if not getattr(config, "tie_word_embeddings", True) else 0
    tensors, largest = sizes_of(model)
    total = sum(tensors) + head
    return ModelSize(
        parameters=total,
        trainable=_trainable(job, model) + _learns(job, HEAD) * head if job.model.freeze or job.model.lora else total,
        weight_bytes=width,
        sequence_bytes=kept,
        logits_bytes=row if chunked else length * vocabulary * (8 + 2 * width),
        once_bytes=chunk + vocabulary * text.hidden_size * (4 + width) if chunked else 0,
        layers=text.num_hidden_layers,
        input_bytes=row,
        tensors=(*tensors, *([head] if head else [])),
        largest_layer=largest,
        checkpoints=model.supports_gradient_checkpointing,
    )


def measure_activations(model_path: str, length: int, dtype: Any, trust_remote_code: bool = False) -> Any:
    """Bytes that one sequence's forward pass keeps for the backward pass; the model, on fake tensors; its config.

    Where the forward pass does not run on fake tensors, the rule of Korthikanti et al. (2022) stands in.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), no_init_weights():
        model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).train()
        held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        ids = torch.zeros(1, length, dtype=torch.long)
        extra = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        try:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                model(input_ids=ids, **extra)
        except Exception:  # an architecture whose forward pass asks for values, or for more than text
            text = config.get_text_config()
            rule = 17 * dtype.itemsize * length * text.hidden_size * text.num_hidden_layers  # arXiv:2205.05198
            return rule, model, config
    return sum(storage.nbytes() for key, storage in kept.items() if key not in held), model, config


def _predicts_tokens(job: Job) -> bool:
    return job.task in ("pretrain", "mlm", "sft", "seq2seq")


def _trainable(job: Job, model: Any) -> int:
    """Parameters that get gradients, the head left out."""
    import torch

    if job.model.lora is not None:
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        return sum(job.model.lora.rank * (module.in_features + module.out_features) for module in linear)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if _learns(job, name, f"{model.base_model_prefix}.{name}")
    )


def _learns(job: Job, *names: str) -> bool:
    """Whether a parameter of these names is trained itself."""
    frozen = any(fnmatchcase(name, pattern) for name in names for pattern in job.model.freeze)
    return job.model.lora is None and not frozen
