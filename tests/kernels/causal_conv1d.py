"""The convolution of the package of this name, which runs on GPUs alone, in torch."""

from typing import Any

import torch


def causal_conv1d_fn(x: Any, weight: Any, bias: Any = None, seq_idx: Any = None, activation: str | None = None) -> Any:
    """[batch, channels, tokens]; a token sees those before it, and with `seq_idx` [batch, tokens] those of its own
    sequence alone."""
    result = torch.zeros_like(x) if bias is None else bias[None, :, None].expand_as(x).clone()
    tokens = x.shape[-1]
    for back in range(min(weight.shape[1], tokens)):
        term = torch.zeros_like(x)
        term[..., back:] = x[..., : tokens - back] * weight[None, :, -1 - back, None]
        if seq_idx is not None and back:
            term[..., back:] = term[..., back:] * (seq_idx[:, back:] == seq_idx[:, :-back])[:, None]
        result = result + term
    return torch.nn.functional.silu(result) if activation in ("silu", "swish") else result
