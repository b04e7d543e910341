"""What a step needs of each rank's memory, by the way the state is kept. Begin at `needs`, which is pure.

Activations are not guessed: `measure_activations` runs the model's own forward pass on fake tensors, which have shapes
and no values, and sums what autograd keeps.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trainers.job.schema import Job

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""CUDA context, libraries' workspaces and what collectives hold."""
MARGIN = 0.08
"""Share of activations and state that an allocator loses to fragments."""
BUCKET_ELEMENTS, LIVE_ELEMENTS = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: elements of a reduction bucket, and of gathered parameters that ZeRO-3 keeps alive."""


@dataclass(frozen=True)
class ModelSize:
    """Of one model under one job."""

    parameters: int
    trainable: int
    weight_bytes: int
    """Bytes of a working weight."""
    sequence_bytes: int
    """What one sequence of `data.max_length` keeps for the backward pass, logits and their copies included."""
    once_bytes: int = 0
    """What the loss holds whatever the micro-batch: a chunk of logits, the head's gradient."""


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs of a rank."""

    way: str
    state: int
    """Weights, gradients, masters and moments that stay on the device."""
    working: int
    """What gathers, reductions and the update hold for a while."""
    activations: int
    host: int
    """State that is kept in host memory."""

    @property
    def device(self) -> int:
        """Of the device, margin and reserve included."""
        return int((self.state + self.working + self.activations) * (1 + MARGIN)) + RESERVE_BYTES


def needs(size: ModelSize, world_size: int, micro_batch_size: int, accumulation: int = 1) -> tuple[Need, ...]:
    """What each way needs, the cheapest way first.

    Args:
        accumulation: micro-batches a step; stages 2 and 3 sum the gradients of several in fp32 (`derive_config`).
    """
    total, trainable, width = size.parameters, size.trainable, size.weight_bytes
    weights, gradients = total * width, trainable * width
    summed = trainable * (4 if accumulation > 1 else width) // world_size
    masters = 0 if width == 4 else 4 * trainable
    adam = masters + 8 * trainable
    mine = adam // world_size
    update = min(masters, 4 * BUCKET_ELEMENTS) // world_size  # a partition's gradients in fp32
    bucket = min(BUCKET_ELEMENTS, trainable) * width
    live = min(LIVE_ELEMENTS, total) * width
    memory = {
        "zero0": (weights + gradients + adam, masters, 0),
        "zero1": (weights + gradients + mine, update + bucket, 0),
        "zero2": (weights + summed + mine, update + 2 * bucket, 0),
        "zero3": (weights // world_size + summed + mine, update + live + bucket, 0),
        "zero3-cpu-offload": (summed, live + bucket, weights // world_size + mine + update),
    }
    activations = size.sequence_bytes * micro_batch_size
    return tuple(
        Need(way, state, working + size.once_bytes, activations, host) for way, (state, working, host) in memory.items()
    )


def measure_size(job: Job, model_path: str) -> ModelSize:
    """Sizes of a job's model, from its configuration alone."""
    import torch

    from trainers.tasks.losses.chunked import CHUNK_BYTES, LEAST_VOCABULARY

    dtype, length = getattr(torch, job.model.dtype), job.data.max_length
    width = dtype.itemsize
    kept, model, config = measure_activations(model_path, length, dtype, job.model.trust_remote_code)
    text = config.get_text_config()
    if every := job.train.checkpoint_every_layers:
        layer, inputs = kept // text.num_hidden_layers, text.num_hidden_layers * length * text.hidden_size * width
        held = 0 if job.train.activation_offload else inputs // every
        kept = min(kept, kept - kept // every + layer + held)  # one layer at a time is computed again
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = _trainable(job, model) if job.model.freeze or job.model.lora else total
    vocabulary, once = text.vocab_size if _predicts_tokens(job) else 0, 0
    if vocabulary >= LEAST_VOCABULARY:
        kept, once = (
            kept + length * text.hidden_size * width,
            3 * CHUNK_BYTES + vocabulary * text.hidden_size * (4 + width),
        )
    else:
        kept += length * vocabulary * (8 + 2 * width)
    return ModelSize(total, trainable, width, kept, once)


def measure_activations(model_path: str, length: int, dtype: Any, trust_remote_code: bool = False) -> Any:
    """Bytes that one sequence's forward pass keeps for the backward pass; the model, on fake tensors; its config.

    Where the forward pass does not run on fake tensors, the rule of Korthikanti et al. (2022) stands in.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
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
    """Parameters that get gradients; a new head, which is small, left out."""
    import torch

    if job.model.lora is not None:
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        return sum(job.model.lora.rank * (module.in_features + module.out_features) for module in linear)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(
            fnmatchcase(each, pattern)
            for each in (name, f"{model.base_model_prefix}.{name}")
            for pattern in job.model.freeze
        )
    )
