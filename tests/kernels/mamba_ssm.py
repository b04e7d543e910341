"""Mamba-2's scan of the package of this name, which runs on GPUs alone, in torch, token by token."""

from typing import Any

import torch
from causal_conv1d import causal_conv1d_fn
from torch.nn.functional import linear, silu, softplus


def mamba_chunk_scan_combined(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    seq_idx: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """x [batch, tokens, heads, width], dt [batch, tokens, heads], B and C [batch, tokens, groups, states]; the state is
    zero where `seq_idx` [batch, tokens] changes."""
    assert z is None and initial_states is None
    dtype = x.dtype
    if dtype == torch.bfloat16:  # the state is kept in fp32
        x, dt, B, C = (each.float() for each in (x, dt, B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (B, C))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outputs = []
    for at in range(x.shape[1]):
        if seq_idx is not None and at:
            state = state * (seq_idx[:, at] == seq_idx[:, at - 1])[:, None, None, None]
        step = dt[:, at, :, None]
        state = state * (step * A[:, None]).exp()[..., None] + (step * x[:, at])[..., None] * B[:, at, :, None]
        outputs.append((state * C[:, at, :, None]).sum(-1))
    result = torch.stack(outputs, 1)
    result = (result if D is None else result + x * D[:, None]).to(dtype)
    return (result, state) if return_final_states else result


def mamba_split_conv1d_scan_combined(
    zxbcdt: Any,
    conv1d_weight: Any,
    conv1d_bias: Any,
    dt_bias: Any,
    A: Any,
    D: Any,
    chunk_size: int,
    seq_idx: Any = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Any = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Any = None,
    outproj_bias: Any = None,
    headdim: int = 1,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """A whole mixer: convolution, scan, norm of what the gate leaves, and projection."""
    assert not norm_before_gate and not return_final_states
    heads = A.shape[0]
    inner = heads * headdim
    gate, mixed, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - heads, heads], -1)
    mixed = causal_conv1d_fn(mixed.mT, conv1d_weight, conv1d_bias, seq_idx, activation).mT
    x, B, C = mixed.split([inner, (mixed.shape[-1] - inner) // 2, (mixed.shape[-1] - inner) // 2], -1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (each.unflatten(-1, (ngroups, -1)) for each in (B, C))
    scanned = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, None, dt_bias, None, seq_idx, True, dt_limit
    ).flatten(2)
    if rmsnorm_weight is None:
        gated = scanned * silu(gate)
    else:
        groups = (scanned * silu(gate)).unflatten(-1, (ngroups, -1))
        gated = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2) * rmsnorm_weight
    return linear(gated, outproj_weight, outproj_bias)
