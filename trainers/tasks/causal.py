"""What the causal tasks share: packed batches, next-token loss, token-level evaluation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.architecture import SHARED, packs_as_one_row
from trainers.known_masks import MaskFacts, masks_known
from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, Example, Task
from trainers.tasks.losses import TokenScores, score_tokens
from trainers.tasks.padding import places

if TYPE_CHECKING:
    import torch


class CausalTask(Task):
    """Next-token prediction over documents, several of which may share a sequence.

    Documents of one sequence are told apart by their bounds, or by position ids that restart at zero with neither a
    cache nor an attention mask: in transformers 5 that, and only that, builds a block-diagonal mask. Padding counts as
    one more document; where every row is one document no mask is needed, since padding comes after all that counts.
    """

    metric = "loss"
    over_vocabulary = True
    auto_class = "AutoModelForCausalLM"
    forward_options = MappingProxyType({"use_cache": False})
    metrics_known: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    @abstractmethod
    def target_mask(self, row: Example) -> Array:
        """bool [length]: which tokens of the document are predicted. The first never can be."""

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        return row.input_ids, self.target_mask(row) & (np.arange(len(row.input_ids)) > 0)

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Packs as rows padded on the right; labels are already shifted to the position that predicts them."""
        longest = max(self.options.pack_length, *(sum(len(row.input_ids) for row in pack) for pack in packs))
        shape = (len(packs), longest)
        ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels, segments = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        rows: list[Example] = []
        bounds = [0]
        for line, pack in enumerate(packs):
            start = 0
            for row in pack:
                end = start + len(row.input_ids)
                ids[line, start:end] = row.input_ids
                positions[line, start:end] = np.arange(end - start)
                labels[line, start : end - 1] = np.where(self.target_mask(row)[1:], row.input_ids[1:], IGNORE)
                segments[line, start:end] = len(rows)
                rows.append(row)
                bounds.append(line * longest + end)
                start = end
            positions[line, start:] = np.arange(longest - start) + (0 if self.options.packing else start)
            if start < longest:
                bounds.append((line + 1) * longest)
        inputs: dict[str, Array] = {"input_ids": ids, "position_ids": positions, "documents": segments,
                  "bounds": self._padded(bounds)}  # fmt: skip
        return Batch(inputs, labels, places(rows), tuple(rows), segments)

    def _padded(self, bounds: list[int]) -> Array:
        """int32; for compiled layers of few different lengths, by documents of no length at the end."""
        empty = 2 ** max(len(bounds) - 1, 63).bit_length() + 1 - len(bounds) if self.options.pack_length else 0
        return np.array(bounds + bounds[-1:] * empty, np.int32)

    def outputs(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the model class returns; packs go as one row where documents are told apart in a row alone."""
        given = {name: tensor for name, tensor in inputs.items() if name not in ("documents", "bounds", SHARED)}
        if not (self.options.packing and packs_as_one_row(model)):
            return model(**given, **self.forward_options)
        from trainers.architecture.document_attention import document_bounds
        from trainers.architecture.sequence_parallel import group_of

        row, group = {name: tensor.reshape(1, -1) for name, tensor in given.items()}, group_of(inputs)
        bounds = document_bounds(model, row["position_ids"], inputs["bounds"], group)
        with masks_known(MaskFacts(padded=False, restarts=True)):  # rows of one document each begin anew in the one row
            outputs = model(**row, **bounds, **self.forward_options)
        if outputs.logits.numel() > 1:  # else the output layer gave the loss in their place
            outputs.logits = outputs.logits.view(*inputs["input_ids"].shape, -1)
        return outputs

    def real_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[batch, seq], 0 where there is padding."""
        return inputs["documents"] >= 0

    def score(self, logits: torch.Tensor | TokenScores, batch: Batch) -> dict[str, Array]:
        assert batch.segments is not None
        return score_tokens(logits, batch.labels, batch.segments, len(batch.rows))

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """Mean over all target tokens, not over documents."""
        return token_metrics(row_scores)


def token_metrics(row_scores: Mapping[str, Array]) -> dict[str, float]:
    """Loss, perplexity and accuracy over all target tokens."""
    targets = float(row_scores["targets"].sum())
    loss = float(row_scores["loss_sum"].sum()) / targets
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": float(row_scores["correct"].sum()) / targets,
    }
