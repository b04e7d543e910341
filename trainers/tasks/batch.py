"""Sequences as read back from shards, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.architecture import SHARED
from trainers.known_masks import MaskFacts, say_bounds
from trainers.records import Array

if TYPE_CHECKING:
    import torch

    from trainers.architecture.sequence_parallel import SequenceGroup


IGNORE = -100
"""Label of positions the loss skips."""


def move(array: Array, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device; on a GPU from page-locked memory, so that the host does not wait for the copy."""
    import torch

    card = torch.device(device).type != "cpu"
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if card else tensor).to(device, non_blocking=card)


@dataclass(frozen=True)
class Example:
    """One sequence as read back from a shard."""

    index: int
    """Its place in the whole split."""
    input_ids: Array
    """int32 [length]."""
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, as numpy arrays."""

    inputs: dict[str, Array]
    """Arguments of the model's forward."""
    labels: Array
    """What the loss compares with; IGNORE where there is no target."""
    rows: Array
    """int64 [documents]: places in the split of the documents in this batch."""
    documents: tuple[Example, ...] = ()
    """The rows themselves, in the order of `rows`, for tasks whose metrics need more than labels."""
    segments: Array | None = None
    """int64 [batch, seq], for packed batches: the document of a position, as an index into `rows`; -1 is padding."""

    def to(self, device: torch.device | str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs and labels as tensors on a device."""
        inputs = {name: move(array, device) for name, array in self.inputs.items()}
        if "bounds" in inputs:
            say_bounds(inputs["bounds"], self.inputs["bounds"])
        return inputs, move(self.labels, device)

    def part_of(self, group: SequenceGroup | None) -> Batch:
        """What this rank has of it in training: `part`, or all where it shares sequences with none."""
        return self.part(group.place, group.size) if group else self

    def part(self, place: int, ranks: int) -> Batch:
        """What one of several ranks has of packed sequences: all of them as one row, of that a part of the positions.
        `bounds` stay those of the whole row, which is filled up to a multiple of the ranks.

        Args:
            place: of the rank among those that share the sequences.
        """
        positions = self.labels.size
        each = -(-positions // ranks)

        def cut(array: Array, fill: int) -> Array:
            row = np.full(each * ranks, fill, dtype=array.dtype)
            row[:positions] = array.ravel()
            return row[None, each * place : each * (place + 1)]

        fills = {"documents": -1}
        inputs = {name: cut(array, fills.get(name, 0)) for name, array in self.inputs.items() if name != "bounds"}
        bounds = self.inputs["bounds"]
        inputs["bounds"] = np.where(bounds == positions, np.int32(each * ranks), bounds)
        inputs[SHARED] = np.array(ranks)
        segments = None if self.segments is None else cut(self.segments, -1)
        return replace(self, inputs=inputs, labels=cut(self.labels, IGNORE), segments=segments)

    def targets(self, device: torch.device | str) -> torch.Tensor:
        """int64 [targets] on a device: places of the labels that count, in the flattened batch. Worked out here, for
        a GPU would have to be waited for."""
        return move(np.flatnonzero(self.labels != IGNORE), device)

    def mask_facts(self) -> MaskFacts:
        """What `masks_known` is told for a forward pass over this batch."""
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        return MaskFacts(
            padded=mask is not None and not mask.all(),
            restarts=positions is not None and bool((np.diff(positions) != 1).any()),
        )

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        if self.segments is not None:
            return int((self.segments >= 0).sum())
        return int(self.inputs["attention_mask"].sum())
