"""mlm: masked language modelling with an encoder. A row: {"text": "Anarchism is a political philosophy ..."}.

Which tokens are hidden is drawn from (seed, step, row), so each epoch hides others, a resumed run hides the same as one
that was not stopped, and evaluation always hides the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.errors import JobError
from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, EncodeRules, Example, Task
from trainers.tasks.causal import token_metrics
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.losses import TokenScores, by_line, score_tokens
from trainers.tasks.metrics.bits_per_byte import bits_per_byte, target_bytes, token_bytes
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, pad_right, places
from trainers.tasks.pretrain import text_refusal
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import SPLIT, EncodedBatch

if TYPE_CHECKING:
    import torch

MASKED, RANDOM = 0.8, 0.1
"""Shares of the hidden tokens that become the mask token and a random token; the rest stay (Devlin et al. 2018)."""


class Mlm(Task):
    """Predicts the hidden tokens of a text."""

    extra_schema = (("words", pa.list_(pa.int32())),)
    """The word each token belongs to, -1 for special tokens."""
    metric = "loss"
    over_vocabulary = True
    auto_class = "AutoModelForMaskedLM"
    metrics_known = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    smaller_is_better = frozenset({"loss", "perplexity", "bits_per_byte"})

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        return text_refusal(row.get("text"))

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize texts without special tokens, then window them and put those around each window."""
        affixes = encoder.affixes
        if affixes is None:
            raise JobError("task mlm: the tokenizer does not put its special tokens around a text; choose an encoder")
        words = encoder.encode_with_words([row["text"] for row in rows])[::-1]
        # popped, not looked up: those of a long text go before the next one's are cut up
        return batch_rows((_fit(*words.pop(), affixes, rules) for _ in rows), self.extra_schema)

    def count_targets(self, table: pa.Table) -> Array:
        """A fixed share of each row's tokens, special ones aside, but at least one."""
        words = table["words"].combine_chunks()
        flat, offsets = words.values.to_numpy(), words.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(flat >= 0)])
        return self._hidden(running[offsets[1:]] - running[offsets[:-1]])

    def _hidden(self, maskable: Array) -> Array:
        hidden: Array = np.maximum(np.round(maskable * self.options.mask.fraction).astype(np.int64), 1)
        return hidden

    def prepare(self, encoder: Encoder) -> None:
        """Note the mask token, the size of the vocabulary and how many bytes of text each token stands for."""
        self._mask_id, self._vocabulary = encoder.mask_id, len(encoder.tokenizer)
        self._bytes = token_bytes(encoder)

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        """As evaluation hides them; training hides others in each epoch."""
        ids, labels = self._hide(row, 0)
        return ids, labels != IGNORE

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        rows = [row for pack in packs for row in pack]
        inputs = as_inputs(rows, pad_id)
        lines = []
        for place, row in enumerate(rows):
            ids, labels = self._hide(row, draw)
            inputs["input_ids"][place, : len(ids)] = ids
            lines.append(labels)
        return Batch(inputs, pad_right(lines, IGNORE), places(rows))

    def _hide(self, row: Example, draw: int) -> tuple[Array, Array]:
        """Ids with some hidden, and the labels of those, both [length]."""
        random = np.random.default_rng([self.options.seed, draw, row.index])
        chosen, targets = choose(np.asarray(row.extra["words"]), self.options, random)
        ids = row.input_ids.astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        labels[targets] = ids[targets]
        fate = random.random(len(chosen))
        ids[chosen[fate < MASKED]] = self._mask_id
        swapped = chosen[(fate >= MASKED) & (fate < MASKED + RANDOM)]
        ids[swapped] = random.integers(0, self._vocabulary, len(swapped))
        return ids, labels

    def score(self, logits: torch.Tensor | TokenScores, batch: Batch) -> dict[str, Array]:
        lines, count = by_line(batch.labels), len(batch.rows)
        held = target_bytes(self._bytes, batch.labels, lines, count)
        return {**score_tokens(logits, batch.labels, lines, count), "bytes": held}

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """Over all hidden tokens; bits per byte is that of the hidden text."""
        return {**token_metrics(row_scores), "bits_per_byte": bits_per_byte(row_scores)}


def choose(words: Array, options: Any, random: np.random.Generator) -> tuple[Array, Array]:
    """Places to hide and places to predict.

    The number to predict depends on the length alone, so that every rank knows a step's targets without drawing. Whole
    words may hide a few tokens more than that: those of the last word beyond the number are hidden, not predicted.
    """
    maskable = np.flatnonzero(words >= 0)
    wanted = max(round(len(maskable) * options.mask.fraction), 1)
    if not options.mask.whole_words:
        chosen = random.permutation(maskable)[:wanted]
        return chosen, chosen
    rank = random.permutation(int(words.max()) + 1)[words[maskable]]
    order = maskable[np.argsort(rank, kind="stable")]
    last_word = words[order[wanted - 1]]
    whole = order[: np.flatnonzero(words[order] == last_word)[-1] + 1]
    return whole, order[:wanted]


def _fit(ids: Array, words: Array, affixes: tuple[list[int], list[int]], rules: EncodeRules) -> EncodedRow:
    """Windows of at most `max_length` with the special tokens around each."""
    room = rules.max_length - len(affixes[0]) - len(affixes[1])
    if not len(ids):
        return EncodedRow.dropped("no_target")
    if len(ids) > room and rules.overlong in ("drop", "error"):
        return EncodedRow.dropped("overlong")
    starts = range(0, len(ids), room) if rules.overlong == "split" else range(1)
    windows = tuple(_window(ids[start : start + room], words[start : start + room], affixes) for start in starts)
    if len(windows) > 1:
        return EncodedRow(SPLIT, windows)
    return EncodedRow.whole(windows[0], max(len(ids) - room, 0))


def _window(ids: Array, words: Array, affixes: tuple[list[int], list[int]]) -> TokenSequence:
    before, after = (np.array(part, dtype=np.int32) for part in affixes)
    inner = np.where(words >= 0, words - max(int(words.min()), 0), np.arange(len(words)))
    around = (np.full(len(part), -1, dtype=np.int32) for part in (before, after))
    first, last = around
    whole = np.concatenate([first, inner, last]).astype(np.int32)
    return TokenSequence(np.concatenate([before, ids, after]), {"words": whole})
