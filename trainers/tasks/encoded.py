"""Rows encoded one by one, for tasks that have nothing quicker, and how they become arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.records import Array
from trainers.sources.text_values import CUT_SHORT, CutShort
from trainers.tokenizer.token_arrays import KEPT, TRUNCATED, EncodedBatch, Tokens, insert_rows

if TYPE_CHECKING:
    from trainers.tasks.base import EncodeRules, Task
    from trainers.tokenizer.encoder import Encoder


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence: ids, plus what the task cannot derive from them."""

    input_ids: Sequence[int] | Array
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedRow:
    """What became of one input row. The ledger keeps `outcome`; `sequences` is empty where the row was dropped."""

    outcome: str
    sequences: tuple[TokenSequence, ...] = ()
    tokens_lost: int = 0

    @staticmethod
    def dropped(reason: str) -> EncodedRow:
        return EncodedRow(f"dropped:{reason}")

    @staticmethod
    def whole(sequence: TokenSequence, tokens_lost: int = 0) -> EncodedRow:
        return EncodedRow(TRUNCATED if tokens_lost else KEPT, (sequence,), tokens_lost)


def batch_rows(encoded: Iterable[EncodedRow], schema: Sequence[tuple[str, pa.DataType]]) -> EncodedBatch:
    """Rows encoded one by one, as arrays.

    Args:
        schema: the task's `extra_schema`.
    """
    rows = list(encoded)
    sequences = [
        (index, part, sequence) for index, row in enumerate(rows) for part, sequence in enumerate(row.sequences)
    ]
    codes = {outcome: code for code, outcome in enumerate(dict.fromkeys(row.outcome for row in rows))}
    return EncodedBatch(
        tokens=Tokens.of([sequence.input_ids for _, _, sequence in sequences]),
        row=np.array([index for index, _, _ in sequences], dtype=np.int64),
        part=np.array([part for _, part, _ in sequences], dtype=np.int32),
        outcomes=tuple(codes),
        codes=np.array([codes[row.outcome] for row in rows], dtype=np.int32),
        tokens_lost=np.array([row.tokens_lost for row in rows], dtype=np.int32),
        extra={name: pa.array([sequence.extra[name] for _, _, sequence in sequences], kind) for name, kind in schema},
    )


def encode_rows(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    encoder: Encoder,
    rules: EncodeRules,
    settled: Sequence[str | None] | None = None,
) -> EncodedBatch:
    """Encode rows, one outcome each: the one settled before, the task's refusal, or what encoding makes of them."""
    outcomes = list(settled or [None] * len(rows))
    for index, row in enumerate(rows):
        if outcomes[index] is None and (reason := _cut_short(row) or task.refusal(row, rules.options)):
            outcomes[index] = f"dropped:{reason}"
    usable = np.array([index for index, outcome in enumerate(outcomes) if outcome is None], dtype=np.int64)
    if len(usable) == len(rows):
        return task.encode(rows, encoder, rules)
    return insert_rows(task.encode([rows[index] for index in usable], encoder, rules), usable, outcomes)


def _cut_short(row: Mapping[str, Any]) -> str | None:
    return CUT_SHORT if any(isinstance(value, CutShort) for value in row.values()) else None
