"""What a job costs: memory by part, arithmetic, time."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from trainers.architecture import num_layers, width
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.choice import Choice
from trainers.model.deepspeed_config import read_template
from trainers.model.lora import ALL_LINEAR
from trainers.model.memory import GIB, ModelSize, Need
from trainers.model.zero_settings import LIVE, Setting, sent_bytes, unsaid
from trainers.records import Record
from trainers.run.events import read_events, steps_of
from trainers.storage import Folder


class WayMemory(Record):
    """What one way to keep the state would need of a worker, in GiB."""

    way: str
    moment: str
    """When the device is fullest: the parts are those of this moment."""
    weights: float
    gradients: float
    optimizer: float
    """fp32 masters and the two moments."""
    activations: float
    logits: float
    working: float
    """What gathers, reductions, the update and the loss hold for a while."""
    margin: float
    """For fragments, and what CUDA takes."""
    device_gib: float
    """All of these."""
    staging: float
    """Of host memory: what checkpoints are copied to."""
    host_gib: float
    """Of host memory, beside that."""
    disk_gib: float
    """Of the node's disk: state that is kept there."""
    fits: bool


def size_model(job: Job, model_path: str) -> ModelSize:
    from trainers.model.model_size import measure_size  # imports torch
    from trainers.training.distill import with_teacher

    return with_teacher(measure_size(job, model_path), job)


def way_memory(need: Need, device_bytes: int) -> WayMemory:
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "working", "margin", "staging")
    gib = {name: getattr(need, name) / GIB for name in parts}
    fits = need.device <= device_bytes
    gib |= {f"{name}_gib": getattr(need, name) / GIB for name in ("device", "host", "disk")}
    return WayMemory(way=need.way, moment=need.moment, **gib, fits=fits)


def messages(choice: Choice, size: ModelSize) -> dict[str, Any]:
    """The plan's fields on what workers send each other, and in messages of what size."""
    zero = read_template(choice.way)["zero_optimization"]
    stage, world_size = zero["stage"], choice.batches.world_size
    gradients = size.trainable * (size.weight_bytes if stage else 4)
    weights = (size.parameters if stage == 3 else size.trainable) * size.weight_bytes
    sent = sent_bytes(stage, weights, gradients, choice.batches.accumulation, 2 * size.parameters <= LIVE)
    settings: dict[str, Setting] = unsaid(zero, size.tensors, size.largest_layer, world_size)
    return {
        "sent_gib_per_step": (sent * (world_size - 1) / world_size + _exchanged(choice, size)) / GIB,
        "settings": tuple((name, each.value, each.reason) for name, each in settings.items()),
    }


def _exchanged(choice: Choice, size: ModelSize) -> float:
    """Bytes that a worker sends a step to those with whom it shares sequences: as much back as forward, and forward
    twice in layers that are computed again."""
    step, sharing = choice.step, choice.batches.sharing
    passes = 2 * size.layers + size.layers_again(step)
    each = size.exchanged_bytes * step.micro_batch_size * step.accumulation
    return passes * each * (sharing - 1) / sharing


def count_flops(job: Job, model_path: str, parameters: int, trainable: int, every: int) -> float:
    """Floating-point operations a token (Kaplan et al. 2020, arXiv:2001.08361, and the causal half of attention).

    Args:
        every: of so many layers one is computed again; 0: none.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=job.model.trust_remote_code)
    attention = 2 * num_layers(config) * width(config) * job.data.max_length
    forward = 2 * parameters + attention
    return forward * (2 + (1 / every if every else 0)) + 2 * trainable + attention


def measured_speed(run: Folder) -> float | None:
    """Median of the run's tokens a second, all workers together; None before its first step."""
    speeds = [step.tokens_per_s for step in steps_of(read_events(run)) if step.tokens_per_s is not None]
    return median(speeds) if speeds else None


def weight_bytes(job: Job, parameters: int) -> int:
    """Bytes of a whole model in its working type."""
    return parameters * (2 if job.model.dtype == "bfloat16" else 4)


NOT_ADAPTED = re.compile(r"embed|wte|wpe|shared|lm_head")


def count_adapters(shapes: Mapping[str, Sequence[int]], lora: LoraSection) -> int:
    """About how many values a checkpoint with adapters holds: rank x (in + out) for each layer that gets them."""
    every = lora.target_modules == ALL_LINEAR
    adapted = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and (
            not NOT_ADAPTED.search(name) if every else name.removesuffix(".weight").endswith(tuple(lora.target_modules))
        )
    ]
    return sum(lora.rank * sum(shape) for shape in adapted)
