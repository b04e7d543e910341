"""Rows of unequal length as one array, for tasks that read one row a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainers.records import Array
from trainers.tasks.base import Example


def pad_right(lines: Sequence[Array], fill: int) -> Array:
    """Lines as one int64 array [lines, longest], filled on the right."""
    padded = np.full((len(lines), max(map(len, lines))), fill, dtype=np.int64)
    for place, line in enumerate(lines):
        padded[place, : len(line)] = line
    return padded


def pad_left(lines: Sequence[Array], fill: int) -> Array:
    """Lines as one int64 array [lines, longest], filled on the left, as generation by causal models needs it."""
    longest = max(map(len, lines))
    padded = np.full((len(lines), longest), fill, dtype=np.int64)
    for place, line in enumerate(lines):
        padded[place, longest - len(line) :] = line
    return padded


def as_inputs(rows: Sequence[Example], pad_id: int) -> dict[str, Array]:
    """input_ids, attention_mask and, where a row holds a pair (`pair_start`), token_type_ids; each [rows, longest]."""
    ids = pad_right([row.input_ids for row in rows], pad_id)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for place, row in enumerate(rows):
        mask[place, : len(row.input_ids)] = 1
        if start := row.extra.get("pair_start"):
            types[place, start : len(row.input_ids)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": types} if types.any() else inputs


def places(rows: Sequence[Example]) -> Array:
    """The rows' places in the split, int64 [rows]."""
    return np.array([row.index for row in rows], dtype=np.int64)
