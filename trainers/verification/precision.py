"""Do the first steps in bf16 go where those in fp32 go? Changes the specimen's model, so it comes last."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from trainers.verification import gradients as g
from trainers.verification.sample import Specimen

STEPS = 3
RATE = 1e-5
"""Adam's first steps are as long as the rate whatever the gradient, so a large one would magnify rounding."""
OFF = 0.05
"""Relative difference of the losses: bf16 keeps 8 bits, and a mean over many targets most of that."""


def bf16_follows(specimen: Specimen) -> tuple[bool, str]:
    """(g) The losses of the first steps in bf16 are those in fp32, up to rounding."""
    import torch

    packs = g.rows_of(specimen, range(min(len(specimen.packs), 2)))
    half = replace(specimen, model=copy.deepcopy(specimen.model).to(torch.bfloat16))
    losses = [_train(one, packs) for one in (specimen, half)]
    off = max(abs(a - b) / max(abs(a), 1e-2) for a, b in zip(*losses, strict=True))
    shown = ", ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(*losses, strict=True))
    return off <= OFF and all(math.isfinite(loss) for loss in losses[1]), f"fp32/bf16 losses {shown}"


def _train(specimen: Specimen, packs: Any) -> list[float]:
    """Losses of a few steps of AdamW on one batch; fp32 masters, as DeepSpeed keeps them."""
    import torch

    masters = [parameter.detach().float().clone().requires_grad_() for parameter in specimen.model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=RATE)
    batch = g.collate(specimen, packs)
    targets = max(g.count_targets(batch), 1)
    losses = []
    for _ in range(STEPS):
        specimen.model.zero_grad(set_to_none=True)
        loss = g.loss_of(specimen, batch) / targets
        loss.backward()
        losses.append(float(loss.detach()))
        for master, parameter in zip(masters, specimen.model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, specimen.model.parameters(), strict=True):
                parameter.copy_(master)
    return losses
