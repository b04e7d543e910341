"""What fused kernels hold, without their arithmetic: put into a Llama, a count on fake tensors sees their memory.

From their sources. FlashAttention 2 keeps queries, keys, values and output; its backward pass takes an fp32 gradient of
the queries and, where heads share keys, gradients of keys and values for every head. Liger turns positions in place,
keeps of a norm its input and of SwiGLU both factors, and writes their gradients where they, or the gradient that came,
lie. Arctic's tiled MLP keeps its input alone. Begin at `fused`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers.models.llama import modeling_llama as llama

TILES = 64
"""Of a sequence, that the MLP computes one after the other."""


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """FlashAttention 2 over [1, heads, tokens, width]; gives [1, tokens, heads, width]."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        output = torch.empty_like(query.transpose(1, 2))
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        query, key, value, _ = ctx.saved_tensors
        found = [torch.empty_like(each) for each in (query, key, value)]
        held = [torch.empty_like(query, dtype=torch.float32)]
        if query.shape != key.shape:
            held += [torch.empty_like(query) for _ in range(2)]
        del held
        return tuple(found)


class Norm(torch.autograd.Function):  # type: ignore[misc]
    """Liger's RMSNorm."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        ctx.save_for_backward(hidden, weight)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient, torch.empty_like(ctx.saved_tensors[1])


class Product(torch.autograd.Function):  # type: ignore[misc]
    """Liger's SiLU of a gate, times the other factor."""

    @staticmethod
    def forward(ctx: Any, gate: Any, other: Any) -> Any:
        ctx.save_for_backward(gate, other)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return ctx.saved_tensors


class Tiled(torch.autograd.Function):  # type: ignore[misc]
    """An MLP tile by tile, in the backward pass again."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, mlp: Any, *weights: Any) -> Any:
        ctx.mlp = mlp
        ctx.save_for_backward(hidden, *weights)
        return torch.cat([mlp(tile) for tile in hidden.chunk(TILES, 1)], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden, *weights = ctx.saved_tensors
        of_hidden, of_weights = torch.empty_like(hidden), [torch.empty_like(each) for each in weights]
        for tile, coming in zip(hidden.chunk(TILES, 1), gradient.chunk(TILES, 1), strict=True):
            with torch.enable_grad():
                output = ctx.mlp(tile.detach().requires_grad_())
            torch.autograd.grad(output, weights, coming)
        return of_hidden, None, *of_weights


def exchange(tensor: Any, heads: int, ranks: int) -> Any:
    """Ulysses' exchange: of [1, heads, tokens, width] a rank's tokens of all heads, all tokens of a rank's heads; or
    back. Heads that are fewer than ranks lie on several."""
    share = max(1.0, ranks / heads)
    return Exchanged.apply(tensor, int(tensor.shape[2] * share)) if ranks > 1 else tensor


class Exchanged(torch.autograd.Function):  # type: ignore[misc]
    """What was sent and what came are both there for a while."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, tokens: int) -> Any:
        ctx.shape = tensor.shape
        sent = torch.empty_like(tensor)
        came = tensor.new_empty(*tensor.shape[:2], tokens, tensor.shape[3])
        del sent
        return came

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        sent, came = torch.empty_like(gradient), gradient.new_empty(ctx.shape)
        del sent
        return came, None


@contextmanager
def fused(liger: bool, tiled: bool = False, ranks: int = 1) -> Iterator[None]:
    """Llamas hold what they do with these kernels.

    Args:
        liger: beside FlashAttention, Liger's norms, positions and SwiGLU.
        tiled: the MLP in tiles, in place of Liger's.
        ranks: that share a sequence by Ulysses.
    """
    whole = llama.LlamaMLP.forward

    def attend(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        heads = self.config.num_key_value_heads
        query, key, value = (exchange(each, count, ranks) for each, count in
                             ((query, query.shape[1]), (key, heads), (value, heads)))  # fmt: skip
        output = Attention.apply(query, key, value)
        return exchange(output.transpose(1, 2), query.shape[1], ranks).transpose(1, 2), None

    def mlp(self: Any, hidden: Any) -> Any:
        if tiled:
            weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            return Tiled.apply(hidden, lambda tile: whole(self, tile), *weights)
        return self.down_proj(Product.apply(self.gate_proj(hidden), self.up_proj(hidden)))

    with patch.dict(llama.ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": attend}):
        if not liger:
            yield
            return
        with (
            patch.object(llama.LlamaRMSNorm, "forward", lambda self, hidden: Norm.apply(hidden, self.weight)),
            patch.object(llama, "apply_rotary_pos_emb", lambda query, key, *_, **__: (query, key)),
            patch.object(llama.LlamaMLP, "forward", mlp),
        ):
            yield
