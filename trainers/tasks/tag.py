"""tag: a tag for each word, such as named entities, in BIO or BIOES (see `tag_schemes`); the set is what training rows
show, in BIOES where any of them is.

A row: {"tokens": ["Empire", "State", "Building"], "tags": ["B-location", "I-location", "I-location"]}. The first
sub-word of a word is tagged, its others are skipped. Words that truncation cuts off, or that have no token, count as
tagged O in evaluation, so that a short `max_length` cannot flatter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, EncodeRules, Example, Task
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.losses import by_line, score_tokens
from trainers.tasks.metrics.entities import entity_counts, entity_metrics, entity_types
from trainers.tasks.metrics.guesses import guess_tag
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, pad_right, places
from trainers.tasks.tag_schemes import OUTSIDE, TAG, in_scheme, normalized
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import EncodedBatch

if TYPE_CHECKING:
    import torch

OTHER_SCHEME = {"S": "B", "E": "I", "B": "S", "I": "E"}
"""What a tag of BIOES may be in BIO, and the other way round."""


class Tag(Task):
    """A token-classification head."""

    extra_schema = (("tags", pa.list_(pa.string())), ("starts", pa.list_(pa.int32())))
    """All tags of the row, and the place of each word's first token up to the last there is; -1 for a word without."""
    metric = "f1"
    auto_class = "AutoModelForTokenClassification"
    new_head = True
    has_labels = True
    metrics_known = ("f1", "precision", "recall", "strict_f1", "strict_precision", "strict_recall", "accuracy", "loss")

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        tokens, tags = row.get("tokens"), row.get("tags")
        if tokens is None or tags is None:
            return "missing_tokens" if tokens is None else "missing_tags"
        if not isinstance(tokens, list) or not isinstance(tags, list):
            return "tokens_or_tags_not_a_list"
        if not all(isinstance(value, str) for value in (*tokens, *tags)):
            return "tokens_or_tags_not_strings"
        if len(tokens) != len(tags):
            return "tokens_and_tags_of_unequal_length"
        if not tokens:
            return "no_tokens"
        return None if all(map(TAG.fullmatch, tags)) else "tag_not_BIO_or_BIOES"

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize words and find where each begins."""
        encodings = encoder.encode_words([row["tokens"] for row in rows], rules.max_length) if rows else []
        read = [normalized(row["tags"]) for row in rows]
        encoded = (_fit(*pair, tags, rules) for pair, (tags, _) in zip(encodings, read, strict=True))
        notes = Counter(note for _, note in read if note is not None)
        return replace(batch_rows(encoded, self.extra_schema), notes=notes)

    def count_targets(self, table: pa.Table) -> Array:
        starts = table["starts"].combine_chunks()
        has_token = pc.greater_equal(starts.flatten(), 0).to_numpy(zero_copy_only=False)
        rows = pc.list_parent_indices(starts).to_numpy()
        return np.bincount(rows[has_token], minlength=len(starts)).astype(np.int64)

    def label_set(self, shown: Iterable[str]) -> tuple[str, ...]:
        """The tags shown; where some rows are BIOES, those too that the entities of the others have in it."""
        labels = tuple(shown)
        if not _has_ends(labels):
            return labels
        kinds = {tag[2:] for tag in labels if tag != OUTSIDE}
        bio = [kind for kind in sorted(kinds) if not {f"S-{kind}", f"E-{kind}"} & set(labels)]
        return (*labels, *(f"{letter}-{kind}" for kind in bio for letter in "BIES" if f"{letter}-{kind}" not in labels))

    def knows(self, label: str, shown: Iterable[str]) -> bool:
        return label in shown or OTHER_SCHEME.get(label[0], "") + label[1:] in shown

    def _tags(self, row: Example) -> list[str]:
        """The tags of a row, in the scheme of the labels."""
        ends, given = _has_ends(self.labels), row.extra["tags"]
        if not ends and set(given) <= set(self.labels):
            return list(given)
        return [_known(pair, self.labels) for pair in zip(in_scheme(given, ends), given, strict=True)]

    def labels_of(self, extra: Mapping[str, Any]) -> Iterable[str]:
        return set(extra["tags"])

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        return row.input_ids, np.isin(np.arange(len(row.input_ids)), row.extra["starts"])

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Rows padded on the right; only the first token of a word has a label."""
        rows = [row for pack in packs for row in pack]
        number = {name: index for index, name in enumerate(self.labels)}
        lines = [np.full(len(row.input_ids), IGNORE, dtype=np.int64) for row in rows]
        for line, row in zip(lines, rows, strict=True):
            for start, tag in zip(row.extra["starts"], self._tags(row), strict=False):
                if start >= 0:
                    line[start] = number[tag]
        return Batch(as_inputs(rows, pad_id), pad_right(lines, IGNORE), places(rows), tuple(rows))

    def score(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """Of each row: loss, words, words tagged right, tags (JSON), and entities true, predicted and right by type."""
        numbers = score_tokens(logits, batch.labels, by_line(batch.labels), len(batch.rows))
        guesses = logits.argmax(-1).cpu().numpy()
        predicted = [self.predicted_tags(guesses[line], row) for line, row in enumerate(batch.documents)]
        truth = [self._tags(row) for row in batch.documents]
        right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(truth, predicted, strict=True)]
        texts = {"true_tags": truth, "said_tags": predicted}
        return {
            "loss_sum": numbers["loss_sum"],
            "targets": numbers["targets"],
            "words": np.array([len(tags) for tags in truth]),
            "words_right": np.array(right),
            **{name: np.array(list(map(json.dumps, tags)), dtype=object) for name, tags in texts.items()},
            **entity_counts(truth, predicted, self.labels),
        }

    def predicted_tags(self, guesses: Array, row: Example) -> list[str]:
        said = [self.labels[guesses[start]] if start >= 0 else OUTSIDE for start in row.extra["starts"]]
        return said + [OUTSIDE] * (len(row.extra["tags"]) - len(said))

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """Entity-level precision, recall and F1 as seqeval has them, plain and strict, overall and by type."""
        return {
            **entity_metrics(row_scores, entity_types(self.labels)),
            "accuracy": float(row_scores["words_right"].sum() / row_scores["words"].sum()),
            "loss": float(row_scores["loss_sum"].sum() / row_scores["targets"].sum()),
        }

    def guesses(self, row_scores: Mapping[str, Array], seed: int) -> dict[str, dict[str, Array]]:
        return guess_tag(row_scores, self.labels)


def _fit(encoding: Any, lost: int, tags: list[str], rules: EncodeRules) -> EncodedRow:
    """Apply the length policy and find the words' first tokens."""
    if lost and rules.overlong != "truncate":
        return EncodedRow.dropped("overlong")
    first: dict[int, int] = {}
    for place, word in enumerate(encoding.word_ids):
        if word is not None:
            first.setdefault(word, place)
    if not first:
        return EncodedRow.dropped("no_target")
    starts = [first.get(word, -1) for word in range(max(first) + 1)]
    return EncodedRow.whole(TokenSequence(encoding.ids, {"tags": tags, "starts": starts}), lost)


def _has_ends(labels: Iterable[str]) -> bool:
    return any(tag.startswith(("E-", "S-")) for tag in labels)


def _known(tags: Sequence[str], labels: Sequence[str]) -> str:
    """The first of the tags that is a label; else the first label of their type, which training shows otherwise."""
    same_kind = (name for name in labels if name != OUTSIDE and name[2:] == tags[0][2:])
    return next((tag for tag in tags if tag in labels), None) or next(same_kind)
