"""pretrain: continued pre-training on plain text. A row: {"text": "Anarchism is a political philosophy ..."}."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.data.manifest import SPLIT
from trainers.tasks.base import IGNORE, Array, Batch, Encoded, EncodeRules, Row, Sequence
from trainers.tasks.causal import CausalTask

if TYPE_CHECKING:
    import torch

    from trainers.data.tokenizer import Encoder

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Pretrain(CausalTask):
    """Every token of a document but its first is a target; a document ends with the end-of-sequence token."""

    metrics_known = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    smaller_is_better = frozenset({"loss", "perplexity", "bits_per_byte"})

    def encode(self, rows: Seq[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[Encoded]:
        """Tokenize texts, end each with EOS and apply the length policy."""
        reasons = [text_refusal(row.get("text")) for row in rows]
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

    def prepare(self, encoder: Encoder) -> None:
        """Note how many bytes of text each token stands for."""
        self._bytes = token_bytes(encoder)

    def judge(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """As for every causal task, and the bytes that the targets stand for."""
        assert batch.segments is not None
        wanted = batch.labels != IGNORE
        lengths = self._bytes[batch.labels[wanted]]
        held = np.bincount(batch.segments[wanted], weights=lengths, minlength=len(batch.rows)).astype(np.int64)
        return {**super().judge(logits, batch), "bytes": held}

    def metrics(self, judged: Mapping[str, Array]) -> dict[str, float]:
        """With bits per byte of text, which compares models whatever their vocabularies."""
        bits = float(judged["loss_sum"].sum()) / math.log(2)
        return {**super().metrics(judged), "bits_per_byte": bits / max(float(judged["bytes"].sum()), 1.0)}


def token_bytes(encoder: Encoder) -> Array:
    """UTF-8 bytes that each token stands for, int64 [vocabulary]; special tokens stand for none.

    Exact for byte-level vocabularies, whose tokens write one character a byte, and for those that write a byte as
    <0x41> and a blank as U+2581.
    """
    tokenizer = encoder.tokenizer
    names, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    byte_level = "ByteLevel" in str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
    added = tokenizer.added_tokens_encoder
    lengths = np.zeros(max(names.values(), default=0) + 1, dtype=np.int64)
    for name, number in names.items():
        if name in special:
            continue
        if byte_level and name not in added:
            lengths[number] = len(name)
        else:
            lengths[number] = 1 if BYTE_TOKEN.fullmatch(name) else len(name.replace("\u2581", " ").encode())
    return lengths


def text_refusal(text: Any) -> str | None:
    """Why a text cannot be trained on, or None."""
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
