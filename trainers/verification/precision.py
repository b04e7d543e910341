"""Does the first step in bf16 go where that in fp32 goes?"""

import math
from typing import Any

import torch

from trainers.verification import gradients
from trainers.verification.sample import CheckContext

OFF = 0.05
"""Relative difference of the losses: bf16 keeps 8 bits, and a mean over many targets most of that."""
ALIKE = 0.9
"""Least cosine of the two gradients."""
PART = 2**22


def bf16_follows(context: CheckContext) -> tuple[bool, str]:
    """(g) The first step in bf16 has the loss of fp32, and its gradient points the same way. The model stays in bf16.

    Later losses say less: a first update of AdamW is smaller than what bf16 tells apart in most weights, so the working
    weights follow their fp32 masters only after some steps.
    """
    if context.is_half:
        return True, "the attention backend computes in bf16 alone, so there is nothing to compare"
    packs = gradients.rows_of(context, range(min(len(context.packs), 2)))
    loss, gradient = _first_step(context, packs)
    context.model.to(torch.bfloat16)  # a copy's layers that keep documents apart would still call those of the original
    half_loss, half_gradient = _first_step(context, packs)
    off = abs(loss - half_loss) / max(abs(loss), 1e-2)
    cosine = _dot(gradient, half_gradient) / math.sqrt(_dot(gradient, gradient) * _dot(half_gradient, half_gradient))
    shown = f"fp32/bf16 loss {loss:.4f}/{half_loss:.4f}, cosine of the gradients {cosine:.4f}"
    return off <= OFF and cosine >= ALIKE and math.isfinite(half_loss), shown


def _dot(first: Any, second: Any) -> float:
    """Inner product of two long vectors: in fp32 a sum of 10^8 squares is off by some percent."""
    return sum(
        float((a.double() * b.double()).sum()) for a, b in zip(first.split(PART), second.split(PART), strict=True)
    )


def _first_step(context: CheckContext, packs: Any) -> tuple[float, Any]:
    batch = gradients.collate(context, packs)
    context.model.zero_grad(set_to_none=True)
    loss = gradients.loss_of(context, batch) / max(gradients.count_targets(batch), 1)
    loss.backward()
    gradient = gradients.take_gradient(context.model)
    context.model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradient
