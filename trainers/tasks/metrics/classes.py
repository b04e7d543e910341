"""scikit-learn's metrics of a classification, from what was scored row by row. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trainers.records import Array

MOST_SCORED = 50
"""Classes up to which scores are kept, AUROC is computed and each class has metrics of its own."""
AVERAGES = ("macro", "micro", "weighted")
RowScores = Mapping[str, Array]
Metric = Callable[[RowScores], float]
THRESHOLD = 0.5
"""With several labels, the score from which a label is given."""


def _f1(average: str) -> Metric:
    def f1(row_scores: RowScores) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(*sides(row_scores), average=average, zero_division=0))

    return f1


def _accuracy(row_scores: RowScores) -> float:
    """With several labels that of the whole set."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(*sides(row_scores)))


def _mcc(row_scores: RowScores) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(*sides(row_scores)))


MULTI_LABEL: dict[str, Metric] = {
    "accuracy": _accuracy,
    **{f"f1_{average}": _f1(average) for average in AVERAGES},
    "loss": lambda row_scores: float(row_scores["loss_sum"].mean()),
}
"""Metrics that need no names, by name."""
SINGLE_LABEL = {**MULTI_LABEL, "mcc": _mcc}


def single_label_metrics(row_scores: RowScores, names: Sequence[str]) -> dict[str, float]:
    """Metrics where each row has one label."""
    return {
        **{name: metric(row_scores) for name, metric in SINGLE_LABEL.items()},
        **_single_auroc(row_scores["label"], row_scores),
        **by_class(*sides(row_scores), names),
    }


def multi_label_metrics(row_scores: RowScores, names: Sequence[str]) -> dict[str, float]:
    """Metrics where each row has any number of labels."""
    from sklearn.metrics import roc_auc_score

    truth, given = sides(row_scores)
    metrics = {name: metric(row_scores) for name, metric in MULTI_LABEL.items()} | by_class(truth, given, names)
    if truth.min(0).max() == 0 and truth.max(0).min() == 1:  # each label is there and is missing somewhere
        metrics["auroc"] = float(roc_auc_score(truth, stack(row_scores, "score_"), average="macro"))
    return metrics


def sides(row_scores: RowScores) -> tuple[Array, Array]:
    """Truth and prediction: int64 [rows] each, or with several labels int8 [rows, labels]."""
    if "label" in row_scores:
        return row_scores["label"], row_scores["prediction"]
    return stack(row_scores, "true_"), (stack(row_scores, "score_") >= THRESHOLD).astype(np.int8)


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

    scores = stack(row_scores, "score_")
    count = scores.shape[1]
    if count < 2 or len(np.unique(label)) < count:
        return {}
    if count == 2:
        return {"auroc": float(roc_auc_score(label, scores[:, 1]))}
    return {"auroc": float(roc_auc_score(label, scores, multi_class="ovr", average="macro", labels=range(count)))}


def stack(row_scores: Mapping[str, Array], prefix: str) -> Array:
    """The columns prefix0, prefix1, ... as one array [rows, classes]."""
    count = sum(name.startswith(prefix) for name in row_scores)
    columns = [row_scores[f"{prefix}{index}"] for index in range(count)]
    return np.stack(columns, axis=1) if columns else np.zeros((0, 0))
