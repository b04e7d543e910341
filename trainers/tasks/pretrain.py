"""pretrain: continued pre-training on plain text. A row: {"text": "Anarchism is a political philosophy ..."}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.records import Array
from trainers.tasks.base import Batch, EncodeRules, Example
from trainers.tasks.causal import CausalTask
from trainers.tasks.losses import TokenScores
from trainers.tasks.metrics.bits_per_byte import bits_per_byte, target_bytes, token_bytes
from trainers.tasks.options import TaskOptions
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import KEPT, SPLIT, TRUNCATED, EncodedBatch, Tokens, starts_of

if TYPE_CHECKING:
    import torch

OUTCOMES = (KEPT, TRUNCATED, SPLIT, "dropped:overlong", "dropped:no_target")


class Pretrain(CausalTask):
    """Every token of a document but its first is a target; a document ends with the end-of-sequence token."""

    metrics_known = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    smaller_is_better = frozenset({"loss", "perplexity", "bits_per_byte"})

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        return text_refusal(row.get("text"))

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        return _fit(_ended(encoder.encode_ids([row["text"] for row in rows]), encoder.eos_id), rules)

    def count_targets(self, table: pa.Table) -> Array:
        """Length minus one: nothing predicts the first token."""
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()  # from offsets: no token is read or copied
        targets: Array = np.maximum(lengths.astype(np.int64) - 1, 0)
        return targets

    def target_mask(self, row: Example) -> Array:
        return np.ones(len(row.input_ids), dtype=bool)

    def prepare(self, encoder: Encoder) -> None:
        self._bytes = token_bytes(encoder)

    def score(self, logits: torch.Tensor | TokenScores, batch: Batch) -> dict[str, Array]:
        assert batch.segments is not None
        held = target_bytes(self._bytes, batch.labels, batch.segments, len(batch.rows))
        return {**super().score(logits, batch), "bytes": held}

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        return {**super().metrics(row_scores), "bits_per_byte": bits_per_byte(row_scores)}


def text_refusal(text: Any) -> str | None:
    """Why a text cannot be trained on, or None."""
    if text is None:
        return "missing_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    return "empty_text" if not text or text.isspace() else None


def _ended(tokens: Tokens, eos_id: int | None) -> Tokens:
    """The same with EOS after each text that does not end with it."""
    if eos_id is None or not len(tokens):
        return tokens
    lengths = tokens.lengths
    last = tokens.ids[np.maximum(tokens.offsets[1:] - 1, 0)] if len(tokens.ids) else np.zeros(len(tokens), np.int32)
    missing = (lengths == 0) | (last != eos_id)
    offsets = starts_of(lengths + missing)
    ids = np.insert(tokens.ids, tokens.offsets[1:][missing], eos_id)
    return Tokens(ids, offsets)


def _fit(tokens: Tokens, rules: EncodeRules) -> EncodedBatch:
    """Each text whole, cut, split into equal windows, or dropped. No window is without a target."""
    lengths, limit = tokens.lengths, rules.max_length
    long, short = lengths > limit, lengths < 2
    windows = np.where(short, 0, 1)
    codes = np.where(short, 4, 0)
    if rules.overlong == "split":
        windows, codes = np.where(long, -(-lengths // limit), windows), np.where(long, 2, codes)
    elif rules.overlong == "truncate":
        codes = np.where(long, 1, codes)
    else:
        windows, codes = np.where(long, 0, windows), np.where(long, 3, codes)
    row = np.repeat(np.arange(len(lengths)), windows)
    part = np.arange(len(row)) - np.repeat(starts_of(windows)[:-1], windows)
    size = np.minimum(lengths[row] - part * limit, limit)
    start = tokens.offsets[row] + part * limit
    orphan = np.flatnonzero((size == 1) & (part > 0))  # move one token over, so that no window is without a target
    size[orphan], start[orphan] = 2, start[orphan] - 1
    size[orphan - 1] -= 1
    lost = np.where(codes == 1, lengths - limit, 0)
    return EncodedBatch(
        tokens.take(start, size), row, part.astype(np.int32), OUTCOMES, codes.astype(np.int32), lost.astype(np.int32)
    )
