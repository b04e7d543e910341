"""Losses and token counts that several tasks share. torch is imported where it is used: the data stage needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainers.records import Array

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of positions the loss skips."""


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy summed over the positions that have a label, fp32 scalar.

    Args:
        logits: [..., classes].
        labels: int64 [...], IGNORE where there is no target.
        smoothing: share of the target distribution spread over all classes.
        weights: fp32 [classes], a factor for each label.
    """
    from torch.nn.functional import cross_entropy

    wanted = labels != IGNORE
    return cross_entropy(
        logits[wanted].float(), labels[wanted], weight=weights, label_smoothing=smoothing, reduction="sum"
    )


def score_tokens(logits: torch.Tensor, labels: Array, document: Array, count: int) -> dict[str, Array]:
    """Loss, targets and correct predictions of each document.

    Args:
        logits: [batch, seq, classes].
        labels: int64 [batch, seq].
        document: int64 [batch, seq], which document a position belongs to.
        count: number of documents.
    """
    import torch

    truth = torch.from_numpy(labels)
    wanted = truth != IGNORE
    picked, truth = logits.cpu()[wanted].float(), truth[wanted]
    losses = torch.nn.functional.cross_entropy(picked, truth, reduction="none").double().numpy()
    correct = (picked.argmax(-1) == truth).numpy()
    of = document[wanted.numpy()]
    return {
        "loss_sum": np.bincount(of, weights=losses, minlength=count),
        "targets": np.bincount(of, minlength=count),
        "correct": np.bincount(of, weights=correct, minlength=count),
    }


def by_line(labels: Array) -> Array:
    """The document of each position where every line of a batch is one document."""
    return np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
