"""DeepSpeed's settings that follow from a model's sizes and the number of ranks, each with its reason. What a
configuration file says itself is never changed. Begin at `zero_settings`, which is pure.

Left at DeepSpeed's own: sub_group_size (1e9 elements a rank, below which one launch updates all), allgather_bucket_size
(5e8, which takes no memory of its own), and stage3_max_reuse_distance (1e9) unless no weight is ever let go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

LEAST_BUCKET, LARGEST_BUCKET = 25_000_000, 500_000_000
"""Elements of a message: below, its start counts; above, it begins too late. The second is DeepSpeed's own bucket."""
PREFETCH, PERSISTENT, LIVE = 50_000_000, 100_000, 1_000_000_000
"""DeepSpeed's own, in elements; no setting goes below."""
WHOLE_SHARE = 0.01
"""Of a model's weights, what small tensors may take that every rank keeps."""
LEAST_SHARE = 1_000_000
"""Elements of a rank's part, from which on parts of their own are worth a message each."""
REUSE = "stage3_max_reuse_distance"
"""DeepSpeed looks so far ahead of each module for uses of its weights; in a small model at all that follow."""
PERSISTENCE = {"param_persistence_threshold", "model_persistence_threshold"}
"""Where a file says one itself, weights may be let go that would stay."""


@dataclass(frozen=True)
class Setting:
    """A value under zero_optimization, and why it is that."""

    value: int | bool
    reason: str


def zero_settings(stage: int, tensors: Sequence[int], layer: int, world_size: int) -> dict[str, Setting]:
    """What a stage gets.

    Args:
        tensors: elements of each of the model's tensors.
        layer: elements of its largest layer.
    """
    if stage == 0:
        return {}
    message = min(max(layer, LEAST_BUCKET), LARGEST_BUCKET)
    settings = {
        "reduce_bucket_size": Setting(message, "gradients of about a layer a message: sent beside the layers below it")
    }
    if stage < 3:
        apart = sum(tensors) >= LEAST_SHARE * world_size
        reason = "each rank gets its part alone, half the bytes" if apart else "parts are too small for a message each"
        return settings | {"use_multi_rank_bucket_allreduce": Setting(not apart, reason)}
    ahead = min(max(layer, PREFETCH), LARGEST_BUCKET)
    live, whole = max(2 * layer, LIVE), _whole(tensors)
    if max(tensors, default=0) <= whole:
        settings[REUSE] = Setting(0, "every tensor stays whole: none is let go, so nobody looks for its next use")
    return settings | {
        "stage3_prefetch_bucket_size": Setting(ahead, "weights of about a layer a message, ahead of their use"),
        "stage3_max_live_parameters": Setting(live, "room for the layer that computes and the one that comes"),
        "stage3_param_persistence_threshold": Setting(
            whole, "norms, biases, adapters and routers stay whole: at most 1 % of the weights"
        ),
    }


def _whole(tensors: Sequence[int]) -> int:
    """The largest size so that all tensors up to it are a small share of the model."""
    room = WHOLE_SHARE * sum(tensors)
    upto = dict(zip(sorted(tensors), accumulate(sorted(tensors)), strict=True))
    return max([PERSISTENT, *(size for size, total in upto.items() if total <= room)])


def sizes_of(model: Any) -> tuple[list[int], int]:
    """Elements of each tensor of a model, and of its largest layer: a module of a list of alike ones."""
    import torch

    def numel(parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = [sum(map(numel, layer.parameters())) for each in lists for layer in each]
    tensors = [numel(parameter) for parameter in model.parameters()]
    return tensors, max(layers, default=sum(tensors))


def with_settings(config: dict[str, Any], model: Any, world_size: int) -> dict[str, Any]:
    """A configuration with what follows from the model where it says nothing, or "auto"."""
    given = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    ours = {name: each.value for name, each in unsaid(given, *sizes_of(model), world_size).items()}
    return {**config, "zero_optimization": {**given, **ours}}


def unsaid(zero: dict[str, Any], tensors: Sequence[int], layer: int, world_size: int) -> dict[str, Setting]:
    """The settings that a zero_optimization does not make itself, by either of DeepSpeed's names."""
    said = {name.removeprefix("stage3_") for name, value in zero.items() if value != "auto"}
    found = zero_settings(zero["stage"], tensors, layer, world_size)
    if said & PERSISTENCE:
        found.pop(REUSE, None)
    return {name: each for name, each in found.items() if name.removeprefix("stage3_") not in said}


def mark_experts(config: dict[str, Any], model: Any) -> None:
    """Let ZeRO-3 fetch each mixture of experts as one, unless the configuration names such modules itself: fewer hooks
    and messages, and ranks whose tokens chose different experts fetch the same weights."""
    if config["zero_optimization"]["stage"] == 3 and "leaf_module" not in config["zero_optimization"]:
        from deepspeed.utils import set_z3_leaf_module

        for block in expert_blocks(model):
            set_z3_leaf_module(block, True)


def expert_blocks(model: Any) -> list[Any]:
    """Modules that hold experts, as a list of alike modules or stacked in one tensor, beside a router that has a row
    for each of them."""
    return [
        module
        for module in model.modules()
        if any(
            count > 1 and _routes(module, child, count, sizes)
            for child in module.children()
            for count, sizes in _expert_counts(child)
        )
    ]


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _expert_counts(child: Any) -> list[tuple[int, set[int]]]:
    """How many experts a module may hold, and the sizes of one's tensors, among them what its router reads."""
    import torch

    if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
        alike = {tuple(map(_shape, each.parameters())) for each in child.children()}
        sizes = {size for each in child.parameters() for size in _shape(each)}
        return [(len(child), sizes)] if len(alike) == 1 and alike != {()} else []
    stacked = (_shape(each) for each in child.parameters(recurse=False))
    return [
        (shape[0], {*shape[1:]}) for shape in stacked if len(shape) == 3 and min(shape) > 1
    ]  # a convolution by channel has a 1


def _routes(module: Any, experts: Any, count: int, sizes: set[int]) -> bool:
    """Whether something beside the experts has a row for each, as long as what an expert reads."""
    beside = [*module.parameters(recurse=False)]
    beside += [each for child in module.children() if child is not experts for each in child.parameters()]
    shapes = map(_shape, beside)
    return any(len(shape) == 2 and shape[0] == count and shape[1] in sizes for shape in shapes)


def sent_bytes(stage: int, weight_bytes: int, gradient_bytes: int, accumulation: int, whole: bool) -> int:
    """Bytes that each rank of many sends in a step; of W ranks (W - 1) / W of it.

    Args:
        gradient_bytes: of all gradients as they are sent: fp32 at stage 0, else in the weights' type.
        whole: whether ZeRO-3 keeps all weights from the forward pass to the backward pass.
    """
    if stage < 3:
        return {0: 2, 1: 1, 2: accumulation}[stage] * gradient_bytes + (weight_bytes if stage else 0)
    return accumulation * (gradient_bytes + (1 if whole else 2) * weight_bytes)
