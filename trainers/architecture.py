"""What makes model families differ, asked of a configuration or a model: one function a property, no family by name.

transformers' models agree on what a text is and on little else: sizes may stand in a nested configuration, a head may
read a row's last token, layers may be dropped at random. Whoever needs to know asks here. `describe` puts what a
configuration alone tells into one record.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
DOCUMENTS = "documents"
"""The attention backend of `trainers.document_attention`."""
POSITIONS = re.compile(r"(?:^|\.)(?:position_embeddings?|embed_positions|wpe)(?:\.weight)?$")
"""Names of tables of learned (or stored) positions: a sequence longer than the table is an error in the model."""
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Lists of a configuration with an entry a layer."""


@dataclass(frozen=True)
class Architecture:
    """What a configuration tells of a model."""

    family: str
    layers: int
    vocabulary: int
    positions: int | None
    """Longest sequence that the configuration names; None where it names none."""
    kinds_of_layers: tuple[str, ...]
    """Such as full_attention, sliding_attention, linear_attention; empty where all are alike."""
    token_types: int
    layer_drop: float
    router_loss: float
    tied: bool
    is_nested: bool
    """Whether the text model stands inside another, beside vision or audio."""


def describe(config: Any) -> Architecture:
    """The record of a configuration."""
    text = text_config(config)
    return Architecture(
        family=str(config.model_type),
        layers=num_layers(config),
        vocabulary=vocabulary(config),
        positions=getattr(text, "max_position_embeddings", None),
        kinds_of_layers=tuple(dict.fromkeys(map(str, _layer_kinds(text)))),
        token_types=token_types(config),
        layer_drop=max(layer_drop(config)),
        router_loss=router_loss_weight(config),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        is_nested=text is not config,
    )


def text_config(config: Any) -> Any:
    """The configuration of the part that reads and writes text: a nested one in multimodal models, else itself."""
    return config.get_text_config()


def configs(config: Any) -> Iterator[Any]:
    """A configuration and that of its text part, each once."""
    yield config
    if text_config(config) is not config:
        yield text_config(config)


def plain_model(model: Any) -> Any:
    """transformers' own model inside an engine or under adapters."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def may_cache(model: Any) -> bool:
    """Whether a forward pass may keep keys and values for a next token, which training has no use for."""
    return "use_cache" in inspect.signature(plain_model(model).forward).parameters


def vocabulary(config: Any) -> int:
    """Token ids that the model has embeddings for."""
    return int(text_config(config).vocab_size)


def num_layers(config: Any) -> int:
    """Layers of the longest stack."""
    depths = [getattr(text_config(config), name, None) for name in DEPTHS]
    return max((depth for depth in depths if isinstance(depth, int)), default=0)


def distinct_layers(config: Any) -> int:
    """How many of a model's first layers hold every kind of layer it has; 2 where all are alike."""
    kinds = _layer_kinds(text_config(config))
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return max(firsts, default=1) + 1 if len(firsts) > 1 else 2


def _layer_kinds(text: Any) -> list[Any]:
    return next((kinds for name in KINDS if isinstance(kinds := getattr(text, name, None), list) and kinds), [])


def token_types(config: Any) -> int:
    """Token types that the model has embeddings for; below 2 it cannot tell a pair's texts apart by them."""
    return int(getattr(text_config(config), "type_vocab_size", 0) or 0)


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


def layer_drop(config: Any) -> tuple[float, ...]:
    """Rates at which whole layers are left out while training, the encoder's and the decoder's or one for all."""
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    return tuple(float(getattr(text_config(config), name, 0.0) or 0.0) for name in names)


def router_loss_weight(config: Any) -> float:
    """Factor of the loss that balances a mixture's experts; 0 unless the configuration asks for router logits."""
    text = text_config(config)
    asked = getattr(text, "output_router_logits", False) or getattr(config, "output_router_logits", False)
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if asked else 0.0


def router_loss(model: Any, outputs: Any, real: Any) -> Any:
    """The balancing loss of a forward pass, times its weight, as the model's own module computes it.

    Args:
        real: [batch, seq], 0 where there is padding, which no expert is charged for.
    """
    inner = plain_model(model)
    text = text_config(inner.config)
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    balance = sys.modules[type(inner).__module__].load_balancing_loss_func
    return router_loss_weight(inner.config) * balance(outputs.router_logits, experts, text.num_experts_per_tok, real)


def set_pad(config: Any, pad_id: int) -> None:
    """Give a configuration the tokenizer's padding id where it has none: heads and embeddings ask for it."""
    for part in configs(config):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id


def cut_layers(config: Any, layers: int) -> None:
    """Make a configuration that of the first layers alone."""
    for part in configs(config):
        for name in DEPTHS:
            if isinstance(depth := getattr(part, name, None), int):
                setattr(part, name, min(depth, layers))
        for name in KINDS:
            if name in vars(part) and isinstance(kinds := getattr(part, name), list):  # elsewhere it is worked out
                setattr(part, name, kinds[:layers])


def shift_right(model: Any, target: Any) -> Any:
    """What a decoder reads in order to write `target` [batch, seq], padded with the padding id: most begin with the
    configuration's start token, those of many languages with the target's last token, which names its language."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=target)
    shifted = target.roll(1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted


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


def convolves(model: Any) -> bool:
    """Whether states pass from token to token outside attention, as in hybrid and state-space models."""
    import torch

    return any(isinstance(part, torch.nn.Conv1d) for part in plain_model(model).modules())


def packs_as_one_row(model: Any) -> bool:
    """Whether documents are told apart within one row alone: by attention kernels for sequences of varying length, and
    by the kernels of layers that carry a state along."""
    attention = _attention(model)
    return attention.startswith("flash") or attention == DOCUMENTS or convolves(model)


def document_bounds(model: Any, positions: Any, bounds: Any) -> dict[str, Any]:
    """Where documents begin, for attention that goes by it and for layers that carry a state along: transformers raises
    where it has no kernel that respects it.

    Args:
        positions: int64 [1, tokens], 0 where a document begins.
        bounds: int32 [documents + 1], the same as places in the row, with its end.
    """
    if _attention(model) == DOCUMENTS:
        from trainers.document_attention import bounds_of

        return bounds_of(bounds, positions.shape[1], makes_mask=router_loss_weight(plain_model(model).config) > 0)
    if not convolves(model):
        return {}
    longest = int(positions.max()) + 1
    return {
        "seq_idx": ((positions == 0).cumsum(1) - 1).int(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attention(model: Any) -> str:
    """Name of the attention backend that a model was built with."""
    return str(text_config(plain_model(model).config)._attn_implementation)
