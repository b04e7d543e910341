"""What llama.cpp's files say of a model: which families they know, their sizes, where weights lie otherwise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainers.records import Array

FAMILIES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("ggml.json").read_text(encoding="utf-8"))
"""By transformers' and by ggml's name: whether ggml's turns neighbouring values of a head, or its two halves."""
ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class GgmlModel:
    """A model in ggml's terms; named as the keys of a GGUF file are."""

    architecture: str
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_length: int
    rms_epsilon: float
    vocabulary: int
    rope_base: float
    rope_factor: float | None
    """Of positions that are stretched linearly."""
    turns: str
    """neighbours | halves"""
    rope_divisors: Array | None
    """What each frequency is divided by, float32 [head_length / 2], where they are stretched as Llama 3 does."""

    def rows(self, name: str, weight: Any) -> Any:
        """A weight with its rows as ggml has them. transformers turns the halves of a head; where ggml turns
        neighbouring values, rows of queries and keys change places.

        Args:
            name: in the file.
        """
        if self.turns == "halves" or not (".attn_q." in name or ".attn_k." in name):
            return weight
        heads = self.head_count if ".attn_q." in name else self.head_count_kv
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)


def ggml_obstacle(config: Any) -> str | None:
    """Why a model cannot be told in ggml's terms here, or None."""
    if not FAMILIES.get(config.model_type):
        return f"it knows the families {', '.join(FAMILIES)}, and this is {config.model_type}"
    rope = _rope(config)["rope_type"]
    if rope not in ROPES:
        return f"it knows the ropes {', '.join(ROPES)}, and this has {rope}"
    return "it knows no sliding window" if getattr(config, "use_sliding_window", False) else None


def ggml_model(config: Any) -> GgmlModel:
    """The record of a configuration that has no `ggml_obstacle`."""
    rope = _rope(config)
    return GgmlModel(
        architecture=config.model_type,
        block_count=config.num_hidden_layers,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        feed_forward_length=config.intermediate_size,
        head_count=config.num_attention_heads,
        head_count_kv=config.num_key_value_heads,
        head_length=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rms_epsilon=config.rms_norm_eps,
        vocabulary=config.vocab_size,
        rope_base=rope["rope_theta"],
        rope_factor=rope["factor"] if rope["rope_type"] == "linear" else None,
        turns=FAMILIES[config.model_type]["turns"],
        rope_divisors=_divisors(config),
    )


def _rope(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", **config.rope_parameters}
    return found


def _divisors(config: Any) -> Array | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if _rope(config)["rope_type"] != "llama3":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = 2 * len(stretched)
    plain = 1.0 / _rope(config)["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    divisors: Array = (plain / stretched.numpy()).astype(np.float32)
    return divisors
