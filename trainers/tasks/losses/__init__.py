"""Losses and token counts that several tasks share. torch is imported where it is used: the data stage needs none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainers.records import Array
from trainers.tasks.batch import IGNORE as IGNORE

if TYPE_CHECKING:
    import torch

    from trainers.architecture.sequence_parallel import SequenceGroup

CHUNK_BYTES = 160 * 2**20
"""fp32 logits that are held at a time. Larger chunks were not faster on a CPU; smaller ones cost up to a third more."""
CARD_CHUNK_BYTES = 2**30
"""The same on a GPU: a chunk's products with the head's weights must outweigh adding up the gradient of those weights.
At 160 MiB that took a quarter of the step of a Llama of 1.24 billion parameters on an H100."""


def find_targets(labels: torch.Tensor) -> torch.Tensor:
    """Places of a batch's targets, int64 [targets], counted over the flattened batch; the host waits for a GPU."""
    return (labels.flatten() != IGNORE).nonzero()[:, 0]


def cross_entropy_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy summed over the positions that have a label, fp32 scalar.

    Args:
        logits: [..., classes].
        labels: int64 [...], IGNORE where there is no target.
        smoothing: share of the target distribution spread over all classes.
        weights: fp32 [classes], a factor for each label.
        targets: as `Batch.targets` gives them; None looks for them.
    """
    from torch.nn.functional import cross_entropy

    targets = find_targets(labels) if targets is None else targets
    picked, truth = logits.flatten(0, -2).index_select(0, targets), labels.flatten().index_select(0, targets)
    return cross_entropy(picked.float(), truth, weight=weights, label_smoothing=smoothing, reduction="sum")


@dataclass(frozen=True)
class TokenScores:
    """What a model says to each target of a batch, in the order in which they stand; it takes the place of logits."""

    losses: torch.Tensor
    """fp32 [targets], the cross entropy."""
    correct: torch.Tensor
    """bool [targets], whether the likeliest token is the right one."""


def score_logits(logits: torch.Tensor, truth: torch.Tensor) -> TokenScores:
    """Scores of [targets, classes], which are turned into fp32, on their device."""
    from torch.nn.functional import cross_entropy

    wide = logits.float()
    return TokenScores(cross_entropy(wide, truth, reduction="none"), wide.argmax(-1) == truth)


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    import torch

    return TokenScores(torch.cat([part.losses for part in parts]), torch.cat([part.correct for part in parts]))


def gather_scores(answers: torch.Tensor | TokenScores, labels: Array, group: SequenceGroup) -> TokenScores:
    """What each rank of a group says to the targets of its part, put together in the order of the positions.

    Args:
        answers: to this rank's part of the positions, logits or scores.
        labels: of that part.
    """
    scores = answers if isinstance(answers, TokenScores) else score_targets(answers, labels)
    parts = group.gather((scores.losses.cpu(), scores.correct.cpu()))
    return join_scores([TokenScores(*each) for each in parts])


def score_tokens(said: torch.Tensor | TokenScores, labels: Array, document: Array, count: int) -> dict[str, Array]:
    """Loss, targets and correct predictions of each document.

    Args:
        said: logits [batch, seq, classes], or scores of the targets.
        labels: int64 [batch, seq].
        document: int64 [batch, seq], which document a position belongs to.
        count: number of documents.
    """
    scores = said if isinstance(said, TokenScores) else score_targets(said, labels)
    losses, correct = scores.losses.double().cpu().numpy(), scores.correct.cpu().numpy()
    of = document[labels != IGNORE]
    return {
        "loss_sum": np.bincount(of, weights=losses, minlength=count),
        "targets": np.bincount(of, minlength=count),
        "correct": np.bincount(of, weights=correct, minlength=count),
    }


def score_targets(logits: torch.Tensor, labels: Array) -> TokenScores:
    """Where the logits lie, and in pieces: no fp32 copy of them all."""
    import torch

    places = torch.from_numpy(np.flatnonzero(labels != IGNORE)).to(logits.device)
    truth = torch.from_numpy(np.ascontiguousarray(labels)).to(logits.device).flatten()[places]
    flat, rows = logits.flatten(0, -2), CHUNK_BYTES // (4 * logits.shape[-1]) + 1
    return join_scores(
        [
            score_logits(flat[places[start : start + rows]], truth[start : start + rows])
            for start in range(0, max(len(places), 1), rows)
        ]
    )


def by_line(labels: Array) -> Array:
    """The document of each position where every line of a batch is one document."""
    return np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
