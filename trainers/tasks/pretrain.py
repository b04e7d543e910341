"""pretrain: continued pre-training on plain text. A row: {"text": "Anarchism is a political philosophy ..."}."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.data.manifest import SPLIT
from trainers.tasks.base import Array, Encoded, EncodeRules, Row, Sequence
from trainers.tasks.causal import CausalTask

if TYPE_CHECKING:
    from trainers.data.tokenizer import Encoder


class Pretrain(CausalTask):
    """Every token of a document but its first is a target; a document ends with the end-of-sequence token."""

    def encode(self, rows: Seq[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[Encoded]:
        """Tokenize texts, end each with EOS and apply the length policy."""
        reasons = [_refusal(row.get("text")) for row in rows]
        encodings = iter(encoder.encode([row["text"] for row, why in zip(rows, reasons, strict=True) if why is None]))
        return [
            Encoded.dropped(why) if why else _fit(_ended(next(encodings).ids, encoder.eos_id), rules) for why in reasons
        ]

    def count_targets(self, table: pa.Table) -> Array:
        """Length minus one: nothing predicts the first token."""
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()  # from offsets: no token is read or copied
        targets: Array = np.maximum(lengths.astype(np.int64) - 1, 0)
        return targets

    def target_mask(self, row: Row) -> Array:
        """All tokens."""
        return np.ones(len(row.input_ids), dtype=bool)


def _refusal(text: Any) -> str | None:
    if text is None:
        return "missing_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    return None if text.strip() else "empty_text"


def _ended(ids: list[int], eos_id: int | None) -> list[int]:
    return ids if eos_id is None or (ids and ids[-1] == eos_id) else [*ids, eos_id]


def _fit(ids: list[int], rules: EncodeRules) -> Encoded:
    """Whole, cut, split into equal windows, or dropped. No window is without a target."""
    limit = rules.max_length
    if len(ids) < 2:
        return Encoded.dropped("no_target")
    if len(ids) <= limit:
        return Encoded.whole(Sequence(ids))
    if rules.overlong == "truncate":
        return Encoded.whole(Sequence(ids[:limit]), len(ids) - limit)
    if rules.overlong != "split":
        return Encoded.dropped("overlong")
    windows = [ids[start : start + limit] for start in range(0, len(ids), limit)]
    if len(windows[-1]) < 2:  # move one token over, so that no window is without a target
        windows[-1].insert(0, windows[-2].pop())
    return Encoded(SPLIT, tuple(Sequence(window) for window in windows))
