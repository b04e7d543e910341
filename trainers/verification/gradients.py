"""Losses and gradients of a sample, document by document and step by step, and how far two of them lie apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainers.batching.batch_plan import BatchPlan
from trainers.batching.batches import StepSource
from trainers.batching.order import Order
from trainers.known_masks import masks_known
from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, Example
from trainers.training import loop
from trainers.verification import isolation
from trainers.verification.sample import CheckContext

DRAW = 1
"""As the first step draws."""


def rows_of(context: CheckContext, packs: Sequence[int]) -> list[list[Example]]:
    """The documents of some packs."""
    return [[context.shards.row(int(row)) for row in context.packs.pack(int(pack))] for pack in packs]


def collate(context: CheckContext, packs: Sequence[Sequence[Example]]) -> Batch:
    """As training does in its first step."""
    return context.task.collate(packs, context.pad_id, DRAW)


def logits_of(context: CheckContext, batch: Batch) -> torch.Tensor:
    """What the loss is computed from, under no_grad, on the host."""
    return isolation.logits_of(context.model, context.task, batch, context.device)


def loss_of(context: CheckContext, batch: Batch) -> torch.Tensor:
    """The loss summed over targets, ready for backward. A router's balancing loss is left out: it is a mean over the
    micro-batch, so it does depend on the cut of a step."""
    inputs, labels = batch.to(context.device)
    with masks_known(batch.mask_facts()):
        logits = context.task.forward(context.model, inputs)
    return context.task.loss_sum(logits, labels, batch.targets(context.device))


def count_targets(batch: Batch) -> int:
    """Targets as the labels show them: positions, or rows where a row has one target."""
    if batch.segments is not None or batch.labels.shape[:1] != batch.rows.shape:
        return int((batch.labels != IGNORE).sum())
    one_each = batch.labels.ndim == 1 or batch.labels.dtype.kind == "f" or batch.labels.shape[1:] == (2,)
    return len(batch.labels) if one_each else int((batch.labels != IGNORE).sum())


def reference_gradient(context: CheckContext, packs: Sequence[int], scale: float) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the documents of some packs, each alone in a batch of its own, times `scale`."""
    context.model.zero_grad(set_to_none=True)
    total = 0.0
    for pack in rows_of(context, packs):
        for row in pack:
            loss = loss_of(context, collate(context, [[row]])) * scale
            loss.backward()
            total += float(loss.detach())
    return total, take_gradient(context.model)


def gradient_of_step(context: CheckContext, order: Order, plan: BatchPlan) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the first step, cut up by `plan` and put together as the trainers' loop and DeepSpeed do."""
    context.model.zero_grad(set_to_none=True)
    total = 0.0
    for rank in range(plan.world_size):
        step = source_of(context, order, plan, rank).next(0)
        for micro in step.micro_batches:
            loss = loop.share_of_step(loss_of(context, micro), step.targets, plan.world_size)
            loss.backward()
            total += float(loss.detach())
    return total / plan.world_size, take_gradient(context.model) / plan.world_size


def source_of(context: CheckContext, order: Order, plan: BatchPlan, rank: int) -> StepSource:
    return StepSource(context.shards, context.packs, order, plan, rank, context.task, context.pad_id)


def take_gradient(model: Any) -> torch.Tensor:
    """All gradients end to end, fp32; zeros where a parameter has none."""
    parts = [
        torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.detach().flatten().float()
        for p in model.parameters()
    ]
    return torch.cat(parts)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Length of the difference over the length of `reference`."""
    return float((result - reference).norm() / reference.norm().clamp(min=1e-30))


def relative_difference(result: float, reference: float, least: float = 1e-30) -> float:
    return abs(result - reference) / max(abs(reference), least)


def padded(batch: Batch) -> Array | None:
    """bool [batch, seq]: positions that hold no token; None where the batch does not say."""
    if batch.segments is not None:
        return batch.segments < 0
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else np.asarray(mask) == 0
