"""The loss of one row as transformers' model class computes it by itself, from unshifted labels: a second opinion."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainers.tasks.base import IGNORE, Example
from trainers.tasks.causal import CausalTask
from trainers.tasks.extract import Extract
from trainers.tasks.seq2seq import Seq2Seq
from trainers.tasks.similarity import Similarity
from trainers.verification import gradients as g
from trainers.verification.sample import CheckContext


def own_loss(context: CheckContext, row: Example) -> float | None:
    """Summed over targets, or None where the model computes none."""
    import torch

    task = context.task
    if isinstance(task, Similarity) and task.embeds:
        return None
    arguments, targets = _arguments(context, row)
    with torch.no_grad():
        found: Any = context.model(**g.as_tensors(context, arguments)).loss
    return float(found) * targets


def _arguments(context: CheckContext, row: Example) -> tuple[dict[str, Any], int]:
    """Inputs with labels as the model class wants them, and the number of targets that its mean is over."""
    task = context.task
    if isinstance(task, CausalTask):
        mask = task.target_mask(row)
        mask[0] = False
        labels = np.where(mask, row.input_ids, IGNORE).astype(np.int64)
        return {"input_ids": row.input_ids.astype(np.int64)[None], "labels": labels[None]}, int(mask.sum())
    if isinstance(task, Seq2Seq):
        return _of_texts(row)
    batch = g.collate(context, [[row]])
    if isinstance(task, Extract):
        start, end = batch.labels[:, 0], batch.labels[:, 1]
        return {**batch.inputs, "start_positions": start, "end_positions": end}, 1
    return {**batch.inputs, "labels": batch.labels}, g.count_targets(batch)


def _of_texts(row: Example) -> tuple[dict[str, Any], int]:
    source, target = row.input_ids.astype(np.int64), np.asarray(row.extra["target"], dtype=np.int64)
    if not row.extra["causal"]:
        return {"input_ids": source[None], "labels": target[None]}, len(target)
    labels = np.concatenate([np.full(len(source), IGNORE), target])
    return {"input_ids": np.concatenate([source, target])[None], "labels": labels[None]}, len(target)
