"""Tokens and outcomes of many rows as flat arrays: what passes from a task to the shard files.

No Python object a token, and none a row, so that writing costs little beside a fast tokenizer. Begin at
`EncodedBatch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from trainers.records import Array


@dataclass(frozen=True)
class Tokens:
    """Ids of several texts, end to end: text t holds ids[offsets[t]:offsets[t + 1]]."""

    ids: Array
    """int32 [tokens]."""
    offsets: Array
    """int64 [texts + 1]."""

    @property
    def lengths(self) -> Array:
        """Tokens of each text, int64 [texts]."""
        lengths: Array = np.diff(self.offsets)
        return lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Array:
        ids: Array = self.ids[self.offsets[index] : self.offsets[index + 1]]
        return ids

    @staticmethod
    def of(lists: Sequence[Any]) -> Tokens:
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = [np.asarray(one, dtype=np.int32) for one in lists]
        return Tokens(np.concatenate(flat) if flat else np.zeros(0, np.int32), starts_of(lengths))

    def take(self, starts: Array, lengths: Array) -> Tokens:
        """Ids of the given slices of `ids`, end to end; a view where the slices already lie so."""
        offsets = starts_of(lengths)
        if len(starts) and np.array_equal(starts, starts[0] + offsets[:-1]):
            return Tokens(self.ids[starts[0] : starts[0] + offsets[-1]], offsets)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Tokens(self.ids[places], offsets)


@dataclass(frozen=True)
class EncodedBatch:
    """What became of consecutive input rows."""

    tokens: Tokens
    """One text a sequence."""
    row: Array
    """int64 [sequences]: the input row of a sequence, as a place in the batch; never falling."""
    part: Array
    """int32 [sequences]: place of a sequence among those of its row."""
    outcomes: tuple[str, ...]
    """Names of the outcomes."""
    codes: Array
    """int32 [rows]: each row's outcome, as an index into `outcomes`."""
    tokens_lost: Array
    """int32 [rows]."""
    extra: Mapping[str, pa.Array] = field(default_factory=dict)
    """[sequences] each: what the task cannot derive."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Rows that were read otherwise than they are written, by what was done."""

    def tokens_of_rows(self) -> Array:
        """Tokens of each row over all its sequences, int32 [rows]."""
        counts = np.bincount(self.row, weights=self.tokens.lengths, minlength=len(self.codes))
        return counts.astype(np.int32)


def starts_of(lengths: Array) -> Array:
    """Where each of several parts begins when they stand end to end, and where the last ends: int64 [parts + 1]."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    held = [part for part in parts if len(part)]
    if len(held) == 1:
        return held[0]
    lengths = [part.lengths for part in held]
    ids = [part.ids[part.offsets[0] : part.offsets[-1]] for part in held]
    return Tokens(
        np.concatenate([*ids, np.zeros(0, np.int32)]), starts_of(np.concatenate([*lengths, np.zeros(0, np.int64)]))
    )


def add_affixes(tokens: Tokens, prefix: Sequence[int], suffix: Sequence[int]) -> Tokens:
    before, after = len(prefix), len(suffix)
    if not before and not after:
        return tokens
    offsets = starts_of(tokens.lengths + before + after)
    ids, inner = np.empty(offsets[-1], np.int32), np.ones(offsets[-1], bool)  # a byte a token, where places take 16
    for starts, numbers in ((offsets[:-1], prefix), (offsets[1:] - after, suffix)):
        for place, number in enumerate(numbers):
            ids[starts + place], inner[starts + place] = number, False
    ids[inner] = tokens.ids[tokens.offsets[0] : tokens.offsets[-1]]
    return Tokens(ids, offsets)


def insert_rows(batch: EncodedBatch, place_of: Array, outcomes: Sequence[str | None]) -> EncodedBatch:
    """The batch within a larger one, some of whose rows never reached the task.

    Args:
        place_of: int64 [rows of batch]: the place of each of its rows among all.
        outcomes: [all rows]: the outcome of each row that did not reach the task, None for the others.
    """
    names = dict.fromkeys([*batch.outcomes, *(name for name in outcomes if name is not None)])
    code_of = {name: code for code, name in enumerate(names)}
    codes = np.array([code_of[name] if name is not None else 0 for name in outcomes], dtype=np.int32)
    lost = np.zeros(len(outcomes), dtype=np.int32)
    codes[place_of], lost[place_of] = batch.codes, batch.tokens_lost
    return replace(batch, row=place_of[batch.row], outcomes=tuple(names), codes=codes, tokens_lost=lost)


KEPT, TRUNCATED, SPLIT = "kept", "truncated", "split"
