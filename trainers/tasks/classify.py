"""classify: one label of a closed set for a text or a pair of texts.

A row: {"text": "a masterpiece four years in the making .", "label": "positive"}. Labels may be strings, integers or
booleans; the set is what the training rows show, in sorted order.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.tasks.base import Array, Batch, Encoded, EncodeRules, Row, Sequence, Task

if TYPE_CHECKING:
    import torch

    from trainers.data.tokenizer import Encoder


class Classify(Task):
    """Single-label classification with a sequence-classification head."""

    extra_schema = (("label", pa.string()), ("pair_start", pa.int32()))
    metric = "accuracy"
    auto_class = "AutoModelForSequenceClassification"
    new_head = True
    metrics_known = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "mcc", "loss")

    def encode(self, rows: Seq[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[Encoded]:
        """Tokenize texts; rows without text or label are dropped with the reason."""
        reasons = [_refusal(row) for row in rows]
        texts = [_text(row) for row, reason in zip(rows, reasons, strict=True) if reason is None]
        encodings = iter(zip(texts, encoder.encode_light(texts), strict=True))
        return [
            Encoded.dropped(reason) if reason else _fit(*next(encodings), str(row["label"]), encoder, rules)
            for row, reason in zip(rows, reasons, strict=True)
        ]

    def count_targets(self, table: pa.Table) -> Array:
        """One target a row."""
        return np.ones(table.num_rows, dtype=np.int64)

    def config_changes(self) -> dict[str, Any]:
        """The labels of the training data, so that the exported model names its answers."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: index for index, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def collate(self, packs: Seq[Seq[Row]], pad_id: int) -> Batch:
        """Rows padded on the right to the longest of the batch."""
        rows = [row for pack in packs for row in pack]
        longest = max(len(row.input_ids) for row in rows)
        ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        types = np.zeros_like(ids)
        for place, row in enumerate(rows):
            length = len(row.input_ids)
            ids[place, :length] = row.input_ids
            mask[place, :length] = 1
            if row.extra["pair_start"]:
                types[place, row.extra["pair_start"] : length] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if types.any():
            inputs["token_type_ids"] = types
        number = {name: index for index, name in enumerate(self.labels)}
        labels = np.array([number[row.extra["label"]] for row in rows], dtype=np.int64)
        return Batch(inputs, labels, np.array([row.index for row in rows], dtype=np.int64))

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy summed over rows; logits [batch, labels]."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction="sum")

    def judge(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """Label, prediction and loss of each row."""
        import torch

        logits = logits.float().cpu()
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels), reduction="none")
        return {
            "label": batch.labels,
            "prediction": logits.argmax(-1).numpy(),
            "loss_sum": losses.double().numpy(),
        }

    def metrics(self, judged: Mapping[str, Array]) -> dict[str, float]:
        """scikit-learn's accuracy, F1 averages and Matthews correlation, and the mean loss."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        label, prediction = judged["label"], judged["prediction"]
        scores = {
            f"f1_{kind}": f1_score(label, prediction, average=kind, zero_division=0)
            for kind in ("macro", "micro", "weighted")
        }
        return {
            "accuracy": float(accuracy_score(label, prediction)),
            **{name: float(score) for name, score in scores.items()},
            "mcc": float(matthews_corrcoef(label, prediction)),
            "loss": float(judged["loss_sum"].mean()),
        }


def _text(row: Mapping[str, Any]) -> Any:
    pair = row.get("text_pair")
    return (row["text"], pair) if pair is not None else row["text"]


def _refusal(row: Mapping[str, Any]) -> str | None:
    """Why the row cannot be used, or None."""
    text, label, pair = row.get("text"), row.get("label"), row.get("text_pair")
    if text is None or label is None:
        return "missing_text" if text is None else "missing_label"
    if not isinstance(text, str) or not (pair is None or isinstance(pair, str)):
        return "text_not_a_string"
    if not isinstance(label, str | int):
        return "label_not_a_name"
    return None if text.strip() else "empty_text"


def _fit(text: Any, encoding: Any, label: str, encoder: Encoder, rules: EncodeRules) -> Encoded:
    """Apply the length policy; the special tokens survive truncation."""
    lost = len(encoding.ids) - rules.max_length
    if lost > 0:
        if rules.overlong != "truncate":
            return Encoded.dropped("overlong")
        encoding = encoder.truncate(text, rules.max_length)
    second = next((place for place, kind in enumerate(encoding.type_ids) if kind == 1), 0)
    return Encoded.whole(Sequence(encoding.ids, {"label": label, "pair_start": second}), max(lost, 0))
