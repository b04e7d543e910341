"""scikit-learn's metrics of a classification, from what was scored row by row. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.records import Array

MOST_SCORED = 50
"""Classes up to which scores are kept, AUROC is computed and each class has metrics of its own."""
AVERAGES = ("macro", "micro", "weighted")
THRESHOLD = 0.5
"""With several labels, the score from which a label is given."""


def single_label_metrics(row_scores: Mapping[str, Array], names: Sequence[str]) -> dict[str, float]:
    """Metrics where each row has one label."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    label, prediction = row_scores["label"], row_scores["prediction"]
    return {
        "accuracy": float(accuracy_score(label, prediction)),
        **{f"f1_{kind}": float(f1_score(label, prediction, average=kind, zero_division=0)) for kind in AVERAGES},
        "mcc": float(matthews_corrcoef(label, prediction)),
        **_single_auroc(label, row_scores),
        "loss": float(row_scores["loss_sum"].mean()),
        **by_class(label, prediction, names),
    }


def multi_label_metrics(row_scores: Mapping[str, Array], names: Sequence[str]) -> dict[str, float]:
    """Metrics where each row has any number of labels; accuracy is that of the whole set."""
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    scores = _stack(row_scores, "score_")
    truth, given = _stack(row_scores, "true_"), (scores >= THRESHOLD).astype(np.int8)
    found = {
        "accuracy": float(accuracy_score(truth, given)),
        **{f"f1_{kind}": float(f1_score(truth, given, average=kind, zero_division=0)) for kind in AVERAGES},
        "loss": float(row_scores["loss_sum"].mean()),
        **by_class(truth, given, names),
    }
    if truth.min(0).max() == 0 and truth.max(0).min() == 1:  # each label is there and is missing somewhere
        found["auroc"] = float(roc_auc_score(truth, scores, average="macro"))
    return found


def by_class(label: Array, prediction: Array, names: Sequence[str]) -> dict[str, float]:
    """precision/NAME, recall/NAME and f1/NAME of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    if not 0 < len(names) <= MOST_SCORED:
        return {}
    scores: Any = precision_recall_fscore_support(label, prediction, labels=range(len(names)), zero_division=0)
    return {
        f"{kind}/{name}": float(value)
        for kind, values in zip(("precision", "recall", "f1"), scores[:3], strict=True)
        for name, value in zip(names, values, strict=True)
    }


def _single_auroc(label: Array, row_scores: Mapping[str, Array]) -> dict[str, float]:
    """One against the rest, macro average; left out where a class is missing, for then it is not defined."""
    from sklearn.metrics import roc_auc_score

    scores = _stack(row_scores, "score_")
    count = scores.shape[1]
    if count < 2 or len(np.unique(label)) < count:
        return {}
    if count == 2:
        return {"auroc": float(roc_auc_score(label, scores[:, 1]))}
    return {"auroc": float(roc_auc_score(label, scores, multi_class="ovr", average="macro", labels=range(count)))}


def _stack(row_scores: Mapping[str, Array], prefix: str) -> Array:
    """The columns prefix0, prefix1, ... as one array [rows, classes]."""
    count = sum(name.startswith(prefix) for name in row_scores)
    columns = [row_scores[f"{prefix}{index}"] for index in range(count)]
    return np.stack(columns, axis=1) if columns else np.zeros((0, 0))
