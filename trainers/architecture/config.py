"""What a configuration tells: sizes, kinds of layers, rates. Names that configurations give these stand here alone."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Lists with an entry a layer."""
INNER_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
)
"""Sizes of feed-forward layers, which see one token at a time."""
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Positions that a position sees where it does not see all before it."""
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
DROPOUT_RATE = re.compile(r"(dropout(_rate|_prob)?|_pdrop)$")
HEAD_RATE = "classifier_dropout"


def text_config(config: Any) -> Any:
    """The configuration of the part that reads and writes text: a nested one in multimodal models, else itself."""
    return config.get_text_config()


def configs(config: Any) -> Iterator[Any]:
    """A configuration and that of its text part, each once."""
    yield config
    if text_config(config) is not config:
        yield text_config(config)


def vocabulary(config: Any) -> int:
    """Token ids that the model has embeddings for."""
    return int(text_config(config).vocab_size)


def width(config: Any) -> int:
    """Values of a token's state."""
    return int(text_config(config).hidden_size)


def positions(config: Any) -> int | None:
    """Longest sequence that the configuration names; None where it names none."""
    named: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return named


def is_tied(config: Any) -> bool:
    """Whether the output layer's weight is that of the token embeddings."""
    return bool(getattr(config, "tie_word_embeddings", True))


def num_layers(config: Any) -> int:
    """Layers of the longest stack."""
    depths = [getattr(text_config(config), name, None) for name in DEPTHS]
    return max((depth for depth in depths if isinstance(depth, int)), default=0)


def distinct_layers(config: Any) -> int:
    """How many of a model's first layers hold every kind of layer it has; 2 where all are alike."""
    kinds = kinds_of_layers(text_config(config))
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return max(firsts, default=1) + 1 if len(firsts) > 1 else 2


def kinds_of_layers(text: Any) -> list[Any]:
    """An entry a layer of a text configuration; empty where all are alike."""
    return next((kinds for name in KINDS if isinstance(kinds := getattr(text, name, None), list) and kinds), [])


def token_types(config: Any) -> int:
    """Token types that the model has embeddings for; below 2 it cannot tell a pair's texts apart by them."""
    return int(getattr(text_config(config), "type_vocab_size", 0) or 0)


def layer_drop(config: Any) -> tuple[float, ...]:
    """Rates at which whole layers are left out while training, the encoder's and the decoder's or one for all."""
    return tuple(float(getattr(text_config(config), name, 0.0) or 0.0) for name in LAYER_DROPS)


def dropout_places(config: Any, model_class: type) -> list[tuple[Any, str]]:
    """Where a configuration, and a head that drops where it does not say how much, have dropout rates: (part, name)."""
    inner = [part for part in vars(text_config(config)).values() if hasattr(part, "model_type")]  # MPT's attention
    makers = [vars(each)["__init__"] for each in model_class.__mro__[:-1] if "__init__" in vars(each)]
    is_read = any(HEAD_RATE in inspect.getsource(maker) for maker in makers)
    return [(config, HEAD_RATE)] * is_read + [
        (part, name)
        for part in (*configs(config), *inner)
        for name, value in part.to_dict().items()
        if DROPOUT_RATE.search(name) and (isinstance(value, float | int) or value is None)
    ]


def attention_values(config: Any) -> tuple[int, int]:
    """Values of a position's query, all heads together, and of its key; its width where heads are not told."""
    text = text_config(config)
    heads, fewer = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int):
        return width(config), width(config)
    each = getattr(text, "head_dim", None) or width(config) // heads
    return heads * each, (fewer if isinstance(fewer, int) else heads) * each


def router_loss_weight(config: Any) -> float:
    """Factor of the loss that balances a mixture's experts; 0 unless the configuration asks for router logits."""
    text = text_config(config)
    asked = getattr(text, "output_router_logits", False) or getattr(config, "output_router_logits", False)
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if asked else 0.0


def experts(config: Any) -> tuple[int, int]:
    """Experts of a mixture's layer, and how many a token takes."""
    text = text_config(config)
    return int(getattr(text, "num_experts", None) or text.num_local_experts), int(text.num_experts_per_tok)
