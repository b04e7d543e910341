"""What a model in memory tells, also on the meta device, inside an engine or under adapters."""

import inspect
import re
import sys
from itertools import chain
from typing import Any

from trainers.architecture.config import LAYER_DROPS, text_config
from trainers.architecture.folder import POSITIONS

DOCUMENTS = "documents"
"""The attention backend of `trainers.architecture.document_attention`."""
SHARED = "shared"
"""Among the inputs of a batch: it holds one rank's part of its sequences, and this many ranks have them together."""
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block|blocks)\.(\d+)\.")
"""A layer's number in a parameter's name."""
STACK = re.compile(r"(?:^|\.)(encoder|decoder)\.")


def plain_model(model: Any) -> Any:
    """transformers' own model inside an engine or under adapters."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def may_cache(model: Any) -> bool:
    """Whether a forward pass may keep keys and values for a next token, which training has no use for."""
    return "use_cache" in inspect.signature(plain_model(model).forward).parameters


def attention_of(model: Any) -> str:
    """Name of the attention backend that a model was built with."""
    return str(text_config(plain_model(model).config)._attn_implementation)


def table_positions(model: Any) -> int | None:
    """Tokens of a sequence that a model has a table of positions for; None where it works positions out."""
    inner = plain_model(model)
    skipped = set(other_modalities(inner))
    rooms = []
    for name, table in chain(inner.named_parameters(), inner.named_buffers()):
        if POSITIONS.search(name) and name not in skipped:
            owner = inner.get_submodule(name.rpartition(".")[0])
            padding = getattr(owner, "padding_idx", None)  # some count from the padding id on, others from an offset
            first = getattr(owner, "offset", 0 if padding is None else padding + 1)
            rooms.append(int(getattr(table, "ds_shape", table.shape)[0]) - first)
    return min(rooms, default=None)


def dropping_stacks(model: Any) -> list[Any]:
    """Parts of a model that leave layers out while training, at the rate in their `layerdrop`."""
    return [part for part in model.modules() if isinstance(rate := getattr(part, LAYER_DROPS[0], None), float) and rate]


def pads_left(part: Any) -> bool:
    """Whether a part of a head reads a row's last place whatever stands there, for rows are padded on the left."""
    return bool(getattr(part, "summary_type", None) == "last")


def other_modalities(model: Any) -> list[str]:
    """Parameters of a multimodal model that its text part does not use: towers of vision and audio, projectors."""
    config = model.config
    text = text_config(config)
    if text is config:
        return []
    bodies = [name for name, part in model.named_modules() if type(getattr(part, "config", None)) is type(text)]
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    used = tuple(f"{name}." for name in (*bodies, *heads) if name)
    return [name for name, _ in model.named_parameters() if not name.startswith(used)] if bodies else []


def unread_by_states(model: Any) -> frozenset[str]:
    """Trainable parameters that a body's last states do not depend on, such as a pooler's; none where its forward pass
    does not run. The model may be on the meta device."""
    import torch

    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        states = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device)).last_hidden_state
    except Exception:  # of whatever kind a model's code raises
        return frozenset()
    slopes = torch.autograd.grad(states.sum(), list(weights.values()), allow_unused=True)
    return frozenset(name for name, slope in zip(weights, slopes, strict=True) if slope is None)


def makes_weights(model_class: type) -> bool:
    """Whether a model computes some of its weights while it loads (sinusoids) from the shape that they have."""
    return any(hasattr(part, "create_weight") for part in vars(sys.modules[model_class.__module__]).values())


def transposed_weights(model: Any) -> frozenset[str]:
    """Names of weights that lie as [in, out], the other way round than torch's linear layers have them."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Conv1D))


def linear_layers(model: Any) -> list[str]:
    """Full names of the linear layers that train, without what makes logits of states and without those that an adapter
    would not reach."""
    output, fused = model.get_output_embeddings(), fused_layers(model)
    layers = {name: model.get_submodule(name) for name in adaptable_layers(model)}
    return [
        name for name, part in layers.items() if part is not output and part.weight.requires_grad and name not in fused
    ]


def adaptable_layers(model: Any) -> list[str]:
    """Full names of all that gives a linear image of what it reads and nothing else: routers of experts that are
    linear layers by class give their choice of experts beside it."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear | Conv1D)
        and not re.search(r"return \w+,", inspect.getsource(type(part).forward))
    ]


def fused_layers(model: Any) -> set[str]:
    """Full names of layers whose weight goes to a kernel that computes a whole mixer (Mamba's output projection): on a
    GPU nobody calls the layer, so an adapter around it would learn nothing."""
    import torch

    return {
        f"{name}.{layer}"
        for name, part in model.named_modules()
        if any(isinstance(child, torch.nn.Conv1d) for child in part.children())
        for layer in re.findall(r"=self\.(\w+)\.weight,", inspect.getsource(type(part)))
    }


def feed_forward_layers(model: Any) -> list[Any]:
    """Parts of a model's layers that look at one position at a time: linear layers with no other matrix beside them,
    called with the states alone. Mixtures of experts are none."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    def is_plain(part: Any) -> bool:
        kinds = ((child, getattr(child, "base_layer", child)) for child in part.children())  # that an adapter is around
        linear = [child for child, kind in kinds if isinstance(kind, torch.nn.Linear | Conv1D)]
        asked = inspect.signature(part.forward).parameters
        others = (weight for child in part.children() if child not in linear for weight in child.parameters())
        return (
            len(linear) > 1
            and len(asked) == 1
            and all(len(getattr(each, "ds_shape", each.shape)) < 2 for each in others)
        )

    layers = (part for part in plain_model(model).modules() if isinstance(part, GradientCheckpointingLayer))
    return [child for layer in layers for child in layer.children() if is_plain(child)]


def stateful_layers(model: Any) -> list[Any]:
    """Parts of the text model in which states pass from token to token outside attention: each has a convolution over
    them, as in hybrid and state-space models."""
    import torch

    inner = plain_model(model)
    others = {name.rsplit(".", 2)[0] for name in other_modalities(inner)}
    return [
        part
        for name, part in inner.named_modules()
        if name not in others and any(isinstance(child, torch.nn.Conv1d) for child in part.children())
    ]


def packs_as_one_row(model: Any) -> bool:
    """Whether documents are told apart within one row alone: by attention kernels for sequences of varying length, and
    by layers that carry a state along."""
    attention = attention_of(model)
    return attention.startswith("flash") or attention == DOCUMENTS or bool(stateful_layers(model))
