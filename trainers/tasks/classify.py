"""classify: labels of a closed set for a text or a pair of texts.

A row: {"text": "a masterpiece four years in the making .", "label": "positive"}. Labels may be strings, integers or
booleans; the set is what the training rows show, in sorted order. With `data.multi_label` a label is a list of them, or
a text that `trainers.tasks.labels.read_list` takes apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.errors import JobError
from trainers.records import Array
from trainers.tasks.base import Batch, EncodeRules, Example, Task
from trainers.tasks.batch import move
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.labels import read_list
from trainers.tasks.losses import cross_entropy_sum, find_targets
from trainers.tasks.metrics.class_draws import class_draws
from trainers.tasks.metrics.classes import (
    MOST_SCORED,
    MULTI_LABEL,
    SINGLE_LABEL,
    multi_label_metrics,
    single_label_metrics,
)
from trainers.tasks.metrics.guesses import guess_class, guess_labels
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, places
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import KEPT, TRUNCATED, EncodedBatch, Tokens, add_affixes

if TYPE_CHECKING:
    import torch


BLANKS = "blanks around a label, which were trimmed"
CUT = "several labels in one text, cut at "
AMBIGUOUS = "labels_in_one_text: not a list as in JSON, nor names between ';', '|' or ',' alone"
BITS = frozenset({"0", "1", "0.0", "1.0", "true", "false"})
MULTI_HOT = "multi_hot: a list of 0 or 1 for each class; write the row's labels, such as [1, 4] for [0, 1, 0, 0, 1, 0]"


class Classify(Task):
    """A sequence-classification head on an encoder or a causal model."""

    extra_schema = (("label", pa.string()), ("pair_start", pa.int32()), ("several", pa.list_(pa.string())))
    metric = "accuracy"
    auto_class = "AutoModelForSequenceClassification"
    new_head = True
    has_labels = True
    metrics_known = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "mcc", "auroc", "loss")

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        text, label, pair, several = row.get("text"), row.get("label"), row.get("text_pair"), options.multi_label
        if text is None:
            return "missing_text"
        if label is None or any(map(_is_missing, label if isinstance(label, list) else [label])):
            return "missing_label"
        if not isinstance(text, str) or not (pair is None or isinstance(pair, str)):
            return "text_not_a_string"
        if several and isinstance(label, str):
            if (read := read_list(label)) is None:
                return AMBIGUOUS
            label = read[0]
        if isinstance(label, list) != several:
            return "label_not_a_list" if several else "multi_label_but_data.multi_label_is_off"
        if several and _is_multi_hot(label):
            return MULTI_HOT
        if not all(map(_is_name, label if several else [label])):
            return "label_not_a_name"
        return None if text.strip() else "empty_text"

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize texts; without a Python object a row where no row has a pair."""
        affixes = encoder.affixes
        pairs = any(row.get("text_pair") is not None for row in rows)
        notes: Counter[str] = Counter()
        if rules.options.multi_label:
            rows = [{**row, "label": _listed(row["label"], notes)} for row in rows]
        labels = [row["label"] for row in rows]
        if affixes is None or pairs or rules.max_length <= len(affixes[0]) + len(affixes[1]):
            batch = batch_rows(encode_each(rows, encoder, rules), self.extra_schema)
        else:
            tokens = encoder.encode_ids([row["text"] for row in rows], special=False)
            batch = _fit_single(tokens, labels, affixes, rules)
        notes[BLANKS] = sum(map(_has_blanks, labels))
        return replace(batch, notes=+notes)

    def labels_of(self, extra: Mapping[str, Any]) -> Iterable[str]:
        return (extra["label"],) if extra["label"] is not None else extra["several"]

    def count_labels(self, batch: pa.RecordBatch) -> dict[str, int]:
        """Counted by arrow, which saves 2 µs a row."""
        shown = [batch.column("label").drop_null(), pc.list_flatten(batch.column("several"))]
        counted = pa.chunked_array(shown).value_counts()
        return {one["values"]: one["counts"] for one in counted.to_pylist()}

    def config_changes(self) -> dict[str, Any]:
        kind = "multi" if self.options.multi_label else "single"
        return {**super().config_changes(), "problem_type": f"{kind}_label_classification"}

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        rows = [row for pack in packs for row in pack]
        number = {name: index for index, name in enumerate(self.labels)}
        if self.options.multi_label:
            labels = np.zeros((len(rows), len(number)), dtype=np.float32)
            for place, row in enumerate(rows):
                labels[place, [number[name] for name in row.extra["several"]]] = 1.0
        else:
            labels = np.array([number[row.extra["label"]] for row in rows], dtype=np.int64)
        return Batch(as_inputs(rows, pad_id), labels, places(rows))

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Cross entropy, or with several labels the mean binary one, summed over rows; logits [batch, labels]."""
        weights = self._weights(logits)
        if not self.options.multi_label:
            return cross_entropy_sum(logits, labels, self.options.label_smoothing, weights, targets)
        from torch.nn.functional import binary_cross_entropy_with_logits

        width, smoothing = logits.shape[-1], self.options.label_smoothing
        rows = (find_targets(labels) if targets is None else targets)[::width] // width  # all of a row count, or none
        picked, truth = logits.index_select(0, rows).float(), labels.index_select(0, rows)
        truth = truth * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(picked, truth, weight=weights, reduction="sum") / width

    def _weights(self, logits: torch.Tensor) -> torch.Tensor | None:
        options = self.options
        values = class_weights(options.class_weights, options.label_counts, options.label_rows, self.labels)
        return None if values is None else move(np.array(values, dtype=np.float32), logits.device)

    def score(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        import torch

        logits, count = logits.detach().double().cpu(), logits.shape[-1]
        truth = torch.from_numpy(batch.labels)
        if self.options.multi_label:
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.double(), reduction="none")
            scores, shown = torch.sigmoid(logits).numpy(), batch.labels.astype(np.int8)
            named = {f"true_{index}": shown[:, index] for index in range(count)}
            return {"loss_sum": losses.mean(-1).numpy(), **named, **_columns(scores, count)}
        losses = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
        numbers = {"label": batch.labels, "prediction": logits.argmax(-1).numpy(), "loss_sum": losses.numpy()}
        return {**numbers, **_columns(torch.softmax(logits, -1).numpy(), count if count <= MOST_SCORED else 0)}

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        every = multi_label_metrics if self.options.multi_label else single_label_metrics
        return every(row_scores, self.labels)

    def left_out(self, metric: str) -> str | None:
        several = metric == "mcc" and self.options.multi_label
        return (
            "it is for rows of one label, not for data.multi_label; choose f1_macro, for example" if several else None
        )

    def guesses(self, row_scores: Mapping[str, Array], seed: int) -> dict[str, dict[str, Array]]:
        return guess_labels(row_scores) if self.options.multi_label else guess_class(row_scores, seed)

    def draw_metrics(
        self, row_scores: Mapping[str, Array], draws: Iterable[Array], metric: str | None = None
    ) -> Iterator[dict[str, float]]:
        if "label" in row_scores or "true_1" in row_scores:
            return class_draws(row_scores, self.labels, draws, metric)
        return super().draw_metrics(row_scores, draws)  # scikit-learn takes one label of many for two classes

    def metric_value(self, name: str, row_scores: Mapping[str, Array]) -> float:
        """scikit-learn takes 20 ms for all metrics of 10,000 rows, and 1 to 6 for one."""
        functions = MULTI_LABEL if self.options.multi_label else SINGLE_LABEL
        return functions[name](row_scores) if name in functions else super().metric_value(name, row_scores)


def class_weights(weights: Any, counts: Mapping[str, int], rows: int, labels: Sequence[str]) -> list[float] | None:
    """The factor of each label's loss, where training has so many rows, and of each label `counts` of them.

    `balanced` counts the labels that training shows; one that only the model's head knows has 1. Raises JobError for a
    factor of a label that there is not.
    """
    if weights is None:
        return None
    if weights == "balanced":
        shown = sum(name in counts for name in labels)
        return [rows / (shown * counts[name]) if name in counts else 1.0 for name in labels]
    unknown = sorted(set(weights) - set(labels))
    if unknown:
        raise JobError(f"train.class_weights: {unknown} are not among the labels {list(labels)[:20]}")
    return [float(weights.get(name, 1.0)) for name in labels]


def _columns(scores: Array, count: int) -> dict[str, Array]:
    return {f"score_{index}": scores[:, index] for index in range(count)}


def encode_each(rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> Iterator[EncodedRow]:
    """Texts and pairs one by one."""
    texts = [row["text"] if row.get("text_pair") is None else (row["text"], row["text_pair"]) for row in rows]
    for row, text, encoding in zip(rows, texts, encoder.encode(texts), strict=True):
        yield fit_pair(text, encoding, _shown(row["label"]), encoder, rules)


def _listed(label: Any, notes: Counter[str]) -> Any:
    """Labels as a list, where they stand in one text."""
    read = read_list(label) if isinstance(label, str) else None
    if read is None:
        return label
    notes[f"{CUT}{read[1]!r}"] += bool(read[1])
    return read[0]


def _shown(label: Any) -> dict[str, Any]:
    if isinstance(label, list):
        return {"label": None, "several": list(dict.fromkeys(map(_name, label)))}
    return {"label": _name(label), "several": None}


def _name(label: Any) -> str:
    """The name of a label: without blanks around, and of a whole float that of the integer."""
    return label.strip() if isinstance(label, str) else str(int(label) if isinstance(label, float) else label)


def _is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, str) and not label.strip()) or label != label  # NaN is no label either


def _is_multi_hot(label: Sequence[Any]) -> bool:
    """Whether a list says 0 or 1 of each class. Of [0, 1] alone it cannot be told: two classes may be meant."""
    bits = len(label) > 1 and all(str(one).strip().lower() in BITS for one in label)
    return bits and (
        len({_name(one) for one in label}) < len(label) or any(isinstance(one, bool | float) for one in label)
    )


def _is_name(label: Any) -> bool:
    return isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())


def _has_blanks(label: Any) -> bool:
    return (
        any(map(_has_blanks, label)) if isinstance(label, list) else isinstance(label, str) and label != label.strip()
    )


def _fit_single(
    tokens: Tokens, labels: Sequence[Any], affixes: tuple[list[int], list[int]], rules: EncodeRules
) -> EncodedBatch:
    """Apply the length policy to texts given without special tokens, and put those around."""
    room = rules.max_length - len(affixes[0]) - len(affixes[1])
    lengths = tokens.lengths
    lost = np.maximum(lengths - room, 0)
    long = lost > 0
    cut = rules.overlong == "truncate"
    kept = np.flatnonzero(~long) if not cut else np.arange(len(tokens))
    shown = [_shown(labels[place]) for place in kept.tolist()]
    return EncodedBatch(
        tokens=add_affixes(tokens.take(tokens.offsets[kept], np.minimum(lengths[kept], room)), *affixes),
        row=kept,
        part=np.zeros(len(kept), np.int32),
        outcomes=(KEPT, TRUNCATED if cut else "dropped:overlong"),
        codes=long.astype(np.int32),
        tokens_lost=(lost if cut else np.zeros(len(tokens))).astype(np.int32),
        extra={
            "label": pa.array([one["label"] for one in shown], pa.string()),
            "pair_start": pa.array(np.zeros(len(kept), np.int32)),
            "several": pa.array([one["several"] for one in shown], pa.list_(pa.string())),
        },
    )


def fit_pair(text: Any, encoding: Any, extra: Mapping[str, Any], encoder: Encoder, rules: EncodeRules) -> EncodedRow:
    """Apply the length policy to a text or a pair; the special tokens survive truncation."""
    lost = len(encoding.ids) - rules.max_length
    if lost > 0:
        if rules.overlong != "truncate":
            return EncodedRow.dropped("overlong")
        encoding = encoder.truncate(text, rules.max_length)
    second = next((place for place, kind in enumerate(encoding.type_ids) if kind == 1), 0)
    return EncodedRow.whole(TokenSequence(encoding.ids, {**extra, "pair_start": second}), max(lost, 0))
