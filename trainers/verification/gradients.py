"""Losses and gradients of a specimen, document by document and step by step, and how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from trainers.batching.batch_plan import BatchPlan
from trainers.batching.batches import StepSource
from trainers.batching.order import Order
from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, Row
from trainers.training import loop
from trainers.verification.sample import Specimen

DRAW = 1
"""As the first step draws."""


def rows_of(specimen: Specimen, packs: Seq[int]) -> list[list[Row]]:
    """The documents of some packs."""
    return [[specimen.shards.row(int(row)) for row in specimen.packs.pack(int(pack))] for pack in packs]


def collate(specimen: Specimen, packs: Seq[Seq[Row]]) -> Batch:
    """As training does in its first step."""
    return specimen.task.collate(packs, specimen.pad_id, DRAW)


def logits_of(specimen: Specimen, batch: Batch) -> Any:
    """Without a gradient."""
    import torch

    with torch.no_grad():
        return specimen.task.forward(specimen.model, as_tensors(specimen, batch.inputs)).float().cpu()


def as_tensors(specimen: Specimen, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for the model, where it is."""
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(specimen.device) for name, array in inputs.items()}


def loss_of(specimen: Specimen, batch: Batch) -> Any:
    """The loss summed over targets, with its gradient to come."""
    import torch

    labels = torch.from_numpy(batch.labels).to(specimen.device)
    return specimen.task.step_loss(specimen.model, as_tensors(specimen, batch.inputs), labels)


def count_targets(batch: Batch) -> int:
    """Targets as the labels show them: positions, or rows where a row has one target."""
    if batch.segments is not None or batch.labels.shape[:1] != batch.rows.shape:
        return int((batch.labels != IGNORE).sum())
    one_each = batch.labels.ndim == 1 or batch.labels.dtype.kind == "f" or batch.labels.shape[1:] == (2,)
    return len(batch.labels) if one_each else int((batch.labels != IGNORE).sum())


def gradient_apart(specimen: Specimen, packs: Seq[int], scale: float) -> tuple[float, Any]:
    """Loss and gradient of the documents of some packs, each alone in a batch of its own, times `scale`."""
    specimen.model.zero_grad(set_to_none=True)
    total = 0.0
    for pack in rows_of(specimen, packs):
        for row in pack:
            loss = loss_of(specimen, collate(specimen, [[row]])) * scale
            loss.backward()
            total += float(loss.detach())
    return total, take_gradient(specimen.model)


def gradient_of_step(specimen: Specimen, order: Order, plan: BatchPlan) -> tuple[float, Any]:
    """Loss and gradient of the first step, cut up by `plan` and put together as the trainers' loop and DeepSpeed do."""
    specimen.model.zero_grad(set_to_none=True)
    total = 0.0
    for rank in range(plan.world_size):
        step = source_of(specimen, order, plan, rank).next(0)
        for micro in step.micro_batches:
            loss = loop.share_of_step(loss_of(specimen, micro), step.targets, plan.world_size)
            loss.backward()
            total += float(loss.detach())
    return total / plan.world_size, take_gradient(specimen.model) / plan.world_size


def source_of(specimen: Specimen, order: Order, plan: BatchPlan, rank: int) -> StepSource:
    """A rank's batches."""
    return StepSource(specimen.shards, specimen.packs, order, plan, rank, specimen.task, specimen.pad_id)


def take_gradient(model: Any) -> Any:
    """All gradients end to end, fp32; zeros where there is none."""
    import torch

    parts = [
        torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.detach().flatten().float()
        for p in model.parameters()
    ]
    return torch.cat(parts)


def apart(found: Any, wanted: Any) -> float:
    """Length of the difference over the length of `wanted`."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def padded(batch: Batch) -> Array | None:
    """bool [batch, seq]: positions that hold no token; None where the batch does not say."""
    if batch.segments is not None:
        return batch.segments < 0
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else np.asarray(mask) == 0
