"""The gated delta rule of flash-linear-attention, which runs on GPUs alone, in torch, token by token."""

from typing import Any

import torch


def chunk_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:
    """q and k [1, tokens, heads, width], v [1, tokens, more heads, other width], g and beta [1, tokens, more heads].
    The state is zero where `cu_seqlens` says that a sequence begins."""
    assert initial_state is None
    dtype = v.dtype
    if dtype == torch.bfloat16:  # the state is kept in fp32
        q, k, v, g, beta = (each.float() for each in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (q, k))
    q, k = (each.repeat_interleave(v.shape[2] // each.shape[2], 2) for each in (q * q.shape[-1] ** -0.5, k))
    begins = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    outputs = []
    for at in range(q.shape[1]):
        if at in begins:
            state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
        state = state * g[:, at].exp()[..., None, None]
        wrong = (v[:, at] - torch.einsum("bhkv,bhk->bhv", state, k[:, at])) * beta[:, at, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, at], wrong)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, at]))
    return torch.stack(outputs, 1).to(dtype), state if output_final_state else None
