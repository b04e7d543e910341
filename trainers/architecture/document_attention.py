"""Attention of packed documents without a mask: each document attends to itself alone, by where it begins.

Its cost grows with the sum of the squares of the documents' lengths, where a mask over the whole pack costs the square
of the pack's. On a GPU torch's own flash kernel for sequences of varying length does it (Dao 2023, arXiv:2307.08691);
elsewhere, and in fp32, one call of scaled dot product attention a document.

Importing this module makes it known to transformers as the attention backend `documents`. Calls that say no bounds
(generation, single rows) are those of `sdpa`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainers.architecture import DOCUMENTS as NAME
from trainers.architecture import attention_of, plain_model, router_loss_weight, stateful_layers
from trainers.architecture.sequence_parallel import SequenceGroup, shared_states
from trainers.known_masks import bounds_on_host

WIDEST_HEAD = 256
"""Of the flash kernel."""
UNKNOWN = ("softcap", "position_bias", "cache")
"""Arguments of other backends that would change the result."""


def bounds_of(bounds: Any, longest: int, makes_mask: bool) -> dict[str, Any]:
    """Arguments of a model's forward pass that reach `attend`.

    Args:
        bounds: int32 [documents + 1], where documents begin in the one row, its end included.
        longest: positions of the longest document, or more.
        makes_mask: whether transformers may make its mask, which nobody reads; else it gets an empty one of four
            dimensions in its place, which layers that carry a state along and the loss of a router cannot read.
    """
    said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return said if makes_mask else {**said, "attention_mask": torch.empty(1, 1, 0, 0, device=bounds.device)}


def document_bounds(model: Any, positions: Any, bounds: Any, group: SequenceGroup | None = None) -> dict[str, Any]:
    """Where documents begin, for attention that goes by it and for layers that carry a state along: transformers raises
    where it has no kernel that respects it.

    Args:
        positions: int64 [1, tokens], 0 where a document begins.
        bounds: int32 [documents + 1], the same as places in the row, with its end.
        group: whose the row is together, where these positions are one rank's part of it.
    """
    if attention_of(model) == NAME:
        inner = plain_model(model)
        reads_mask = getattr(inner, "keeps_states_apart", False) or router_loss_weight(inner.config) > 0
        longest = positions.shape[1] * (group.size if group else 1)
        found = bounds_of(bounds, longest, makes_mask=reads_mask)
        return {**found, "sequence_group": group} if group else found
    if group:
        raise ValueError(f"sequences are shared with attention backend {NAME} alone, not {attention_of(model)}")
    if not stateful_layers(model):
        return {}
    longest = max(end - begin for begin, end in pairwise(bounds_on_host(bounds)))
    return {
        "seq_idx": ((positions == 0).cumsum(1) - 1).int(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    sequence_group: SequenceGroup | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """As transformers calls an attention backend.

    Args:
        query: [1, heads, positions, width]; key and value may have fewer heads.
        sliding_window: positions that a position sees, its own included; None sees all before it.
        sequence_group: the ranks that have the other parts of the positions, where this one has a part.

    Returns:
        [1, positions, heads, width], and no weights.

    Raises:
        ValueError: where the model asks for what this backend does not compute.
    """
    asked = [name for name in UNKNOWN if others.get(name) is not None]
    sinks = others.pop("s_aux", None)
    if not asked and (cu_seq_lens_q is None or max_length_q is None):
        if sinks is not None:
            seen = _causal(query, key) if attention_mask is None else attention_mask
            return _with_sinks([query, key, value], seen, dropout, scaling, sinks).transpose(1, 2).contiguous(), None
        given = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **others}
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return output, None
    if asked or others.get("is_causal") is False:
        raise ValueError(f"attention backend {NAME} does not compute {', '.join(asked) or 'non-causal attention'}")
    if sequence_group is None:
        return _by_bounds(
            [query, key, value], cu_seq_lens_q, max_length_q, dropout, scaling, sliding_window, sinks
        ), None
    *states, sinks = shared_states(sequence_group, query, key, value, sinks)
    found = _by_bounds(states, cu_seq_lens_q, max_length_q, dropout, scaling, sliding_window, sinks)
    return sequence_group.own_positions(found), None


def _by_bounds(
    states: list[Any],
    bounds: Any,
    longest: int | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
    sinks: Any,
) -> Any:
    """Attention of a row's documents, [1, positions, heads, width]."""
    query, key, value = states
    if sinks is None and _flash_takes(query, value):
        flat = [tensor[0].transpose(0, 1) for tensor in states]
        near = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        found = torch.ops.aten._flash_attention_forward(
            *flat, bounds, bounds, longest, longest, dropout, True, False, scale=scaling, **near
        )
        return found[0][None]
    return _one_by_one([query, key, value], bounds, dropout, scaling, window, sinks)


def _flash_takes(query: Any, value: Any) -> bool:
    """Whether the kernel computes such heads on this GPU."""
    width = query.shape[-1]
    halves = query.dtype in (torch.bfloat16, torch.float16)
    fits = halves and width == value.shape[-1] <= WIDEST_HEAD and width % 8 == 0
    return bool(fits and query.is_cuda and has_flash(query.device.index))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_flash(gpu: int) -> bool:
    """Whether a GPU has what the kernel is made of: that came with NVIDIA's Ampere (A100, RTX 30)."""
    return bool(torch.cuda.get_device_capability(gpu) >= (8, 0))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # or each set of lengths would be compiled
def _one_by_one(
    states: list[Any], bounds: Any, dropout: float, scaling: float | None, window: int | None, sinks: Any
) -> Any:
    """Attention of a row's documents, [1, positions, heads, width]."""
    parts = [
        _dense([tensor[:, :, begin:end] for tensor in states], dropout, scaling, window, sinks)
        for begin, end in pairwise(bounds_on_host(bounds))
        if end > begin
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _dense(states: list[Any], dropout: float, scaling: float | None, window: int | None, sinks: Any) -> Any:
    """Attention of one document's query, key and value: a position sees all before it, or a window."""
    query, key, value = states
    length = query.shape[2]
    band = None
    if window is not None and length > window:
        band = _causal(query, key).triu(1 - window)
    if sinks is not None:
        return _with_sinks(states, _causal(query, key) if band is None else band, dropout, scaling, sinks)
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, band, dropout, band is None, scale=scaling, enable_gqa=shared
    )


def _causal(query: Any, key: Any) -> Any:
    """Which positions of the keys each of the queries sees, bool; the last query sees all."""
    shape = query.shape[2], key.shape[2]
    return torch.ones(*shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])


def _with_sinks(states: list[Any], seen: Any, dropout: float, scaling: float | None, sinks: Any) -> Any:
    """Attention of which each head's sink, a logit beside those of the keys, takes a share for nothing."""
    query, key, value = states
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
