"""What the causal tasks share: packed batches, next-token loss, token-level evaluation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from trainers.tasks.base import IGNORE, Array, Batch, Row, Task

if TYPE_CHECKING:
    import torch


class CausalTask(Task):
    """Next-token prediction over documents, several of which may share a sequence.

    Documents of one sequence are told apart by position ids that restart at zero, with neither a cache nor an attention
    mask: in transformers 5 that, and only that, builds a block-diagonal mask. Padding counts as one more document.
    """

    metric = "loss"
    auto_class = "AutoModelForCausalLM"
    forward_options = MappingProxyType({"use_cache": False})
    metrics_known = ("loss", "perplexity", "token_accuracy")

    @abstractmethod
    def target_mask(self, row: Row) -> Array:
        """bool [length]: which tokens of the document are predicted. The first never can be."""

    def collate(self, packs: Seq[Seq[Row]], pad_id: int) -> Batch:
        """Packs as rows padded on the right; labels are already shifted to the position that predicts them."""
        longest = max(sum(len(row.input_ids) for row in pack) for pack in packs)
        shape = (len(packs), longest)
        ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels, segments = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        rows: list[int] = []
        for line, pack in enumerate(packs):
            start = 0
            for row in pack:
                end = start + len(row.input_ids)
                ids[line, start:end] = row.input_ids
                positions[line, start:end] = np.arange(end - start)
                labels[line, start : end - 1] = np.where(self.target_mask(row)[1:], row.input_ids[1:], IGNORE)
                segments[line, start:end] = len(rows)
                rows.append(row.index)
                start = end
            positions[line, start:] = np.arange(longest - start)
        inputs = {"input_ids": ids, "position_ids": positions}
        return Batch(inputs, labels, np.array(rows, dtype=np.int64), segments)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy summed over target positions; logits [batch, seq, vocabulary]."""
        from torch.nn.functional import cross_entropy

        wanted = labels != IGNORE
        return cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")

    def judge(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """Loss, targets and correct predictions of each document."""
        import torch

        labels = torch.from_numpy(batch.labels)
        wanted = labels != IGNORE
        assert batch.segments is not None
        document = batch.segments[wanted.numpy()]
        picked, truth = logits.cpu()[wanted].float(), labels[wanted]
        losses = torch.nn.functional.cross_entropy(picked, truth, reduction="none").double().numpy()
        correct = (picked.argmax(-1) == truth).numpy()
        count = len(batch.rows)
        return {
            "loss_sum": np.bincount(document, weights=losses, minlength=count),
            "targets": np.bincount(document, minlength=count),
            "correct": np.bincount(document, weights=correct, minlength=count),
        }

    def metrics(self, judged: Mapping[str, Array]) -> dict[str, float]:
        """Mean over all target tokens, not over documents."""
        targets = float(judged["targets"].sum())
        loss = float(judged["loss_sum"].sum()) / targets
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": float(judged["correct"].sum()) / targets,
        }
