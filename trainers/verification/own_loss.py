"""The loss of one row as transformers' model class computes it by itself, from unshifted labels: a second opinion."""

from typing import Any

import numpy as np
import torch

from trainers.architecture import router_loss_weight, token_types
from trainers.tasks.base import IGNORE, Example
from trainers.tasks.causal import CausalTask
from trainers.tasks.extract import Extract
from trainers.tasks.seq2seq import Seq2Seq
from trainers.tasks.similarity import Similarity
from trainers.verification import gradients
from trainers.verification.sample import CheckContext


def own_loss(context: CheckContext, row: Example) -> float | None:
    """Summed over targets, or None where the model computes none."""
    task = context.task
    if isinstance(task, Similarity) and task.embeds:
        return None
    arguments, targets = _arguments(context, row)
    if token_types(context.model.config) < 2:
        arguments.pop("token_type_ids", None)
    tensors = {name: torch.from_numpy(array).to(context.device) for name, array in arguments.items()}
    with torch.no_grad():
        outputs = context.model(**tensors)
    balance = getattr(outputs, "aux_loss", None)  # of a mixture's router, which is not in the loss of the task
    weight = router_loss_weight(context.model.config)
    return float(outputs.loss - (weight * balance if balance is not None and weight else 0.0)) * targets


def _arguments(context: CheckContext, row: Example) -> tuple[dict[str, Any], int]:
    """Inputs with labels as the model class wants them, and the number of targets that its mean is over."""
    task = context.task
    if isinstance(task, CausalTask):
        mask = task.target_mask(row)
        mask[0] = False
        labels = np.where(mask, row.input_ids, IGNORE).astype(np.int64)
        return {"input_ids": row.input_ids.astype(np.int64)[None], "labels": labels[None]}, int(mask.sum())
    if isinstance(task, Seq2Seq):
        return _arguments_of_texts(row)
    batch = gradients.collate(context, [[row]])
    if isinstance(task, Extract):
        start, end = batch.labels[:, 0], batch.labels[:, 1]
        return {**batch.inputs, "start_positions": start, "end_positions": end}, 1
    return {**batch.inputs, "labels": batch.labels}, gradients.count_targets(batch)


def _arguments_of_texts(row: Example) -> tuple[dict[str, Any], int]:
    source, target = row.input_ids.astype(np.int64), np.asarray(row.extra["target"], dtype=np.int64)
    if not row.extra["causal"]:
        return {"input_ids": source[None], "labels": target[None]}, len(target)
    labels = np.concatenate([np.full(len(source), IGNORE), target])
    return {"input_ids": np.concatenate([source, target])[None], "labels": labels[None]}, len(target)
