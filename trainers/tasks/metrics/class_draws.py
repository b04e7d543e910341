"""Metrics of a classification over rows drawn again and again: what `classes.py` says of each draw, far sooner.

scikit-learn takes 35 ms for the metrics of one draw, which is most of a small evaluation where hundreds are drawn. All
but AUROC follow from three counts a class: true, predicted and right. AUROC is the share of pairs of a positive and a
negative row whose scores are in order, ties counting half (Hanley and McNeil 1982), by a sort that all draws share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from trainers.records import Array
from trainers.tasks.metrics.classes import MOST_SCORED, sides, stack

RowScores = Mapping[str, Array]


def class_draws(
    row_scores: RowScores, names: Sequence[str], draws: Iterable[Array], metric: str | None = None
) -> Iterator[dict[str, float]]:
    """As `single_label_metrics` or `multi_label_metrics`, whichever these rows are for, of each draw.

    Args:
        draws: places of rows, int [rows drawn] each.
        metric: where one alone is asked for; what takes longer than it is left out.
    """
    single = "label" in row_scores
    count_of = _count_single(row_scores, names) if single else _count_multi(row_scores)
    truth, given = sides(row_scores)
    same = (truth == given if single else (truth == given).all(1)).astype(np.float64)
    loss = row_scores["loss_sum"]
    if metric in ("accuracy", "loss"):
        numbers = same if metric == "accuracy" else loss
        yield from ({metric: float(numbers[rows].mean())} for rows in draws)
        return
    auroc = _auroc(row_scores) if metric in (None, "auroc") else lambda weights: np.nan
    told = names if metric is None or "/" in metric else ()
    for rows in draws:
        weights = np.bincount(rows, minlength=len(loss)).astype(np.float64)
        right, true, said = count_of(weights)
        metrics = {
            "accuracy": float(same[rows].mean()),
            **_f1(right, true, said, single),
            "loss": float(loss[rows].mean()),
        }
        if single:
            metrics["mcc"] = _mcc(right, true, said)
        value = auroc(weights)
        yield metrics | ({} if np.isnan(value) else {"auroc": value}) | _by_class(right, true, said, told)


Counts = tuple[Array, Array, Array]
"""Rows of each class that are predicted right, that are of it, and that are predicted as it."""


def _count_single(row_scores: RowScores, names: Sequence[str]) -> Callable[[Array], Counts]:
    label, said = row_scores["label"], row_scores["prediction"]
    size = max(int(label.max()) + 1, int(said.max()) + 1, len(names))
    hits = label == said

    def count(weights: Array) -> Counts:
        right = np.bincount(label[hits], weights[hits], size)
        return right, np.bincount(label, weights, size), np.bincount(said, weights, size)

    return count


def _count_multi(row_scores: RowScores) -> Callable[[Array], Counts]:
    truth, given = (side.astype(np.float32) for side in sides(row_scores))
    both = truth * given

    def count(weights: Array) -> Counts:
        drawn = weights.astype(np.float32)  # whole numbers, exact up to 16 million
        right, true, said = ((drawn @ side).astype(np.float64) for side in (both, truth, given))
        return right, true, said

    return count


def _f1(right: Array, true: Array, said: Array, single: bool) -> dict[str, float]:
    """Of one label a row, classes that a draw neither shows nor predicts do not count."""
    shown = (true + said > 0) if single else np.ones(len(true), dtype=bool)
    each = _share(2 * right, true + said)
    return {
        "f1_macro": float(each[shown].mean()),
        "f1_micro": float(_share(2 * right.sum(), true.sum() + said.sum())),
        "f1_weighted": float(_share((each * true).sum(), true.sum())),
    }


def _mcc(right: Array, true: Array, said: Array) -> float:
    total = true.sum()
    above = right.sum() * total - true @ said
    below = (total**2 - true @ true) * (total**2 - said @ said)
    return float(above / np.sqrt(below)) if below > 0 else 0.0


def _by_class(right: Array, true: Array, said: Array, names: Sequence[str]) -> dict[str, float]:
    if not 0 < len(names) <= MOST_SCORED:
        return {}
    kinds = {"precision": _share(right, said), "recall": _share(right, true), "f1": _share(2 * right, true + said)}
    return {f"{kind}/{name}": float(values[at]) for kind, values in kinds.items() for at, name in enumerate(names)}


def _share(part: Array, whole: Array) -> Array:
    """0 where there is nothing, as zero_division=0 has it."""
    return part / np.where(whole > 0, whole, 1)


def _auroc(row_scores: RowScores) -> Callable[[Array], float]:
    """AUROC of weighted rows, the mean over classes; nan where one has no positive row or no negative one."""
    scores, label = stack(row_scores, "score_"), row_scores.get("label")
    if label is None:
        positive = stack(row_scores, "true_") == 1
    else:
        positive = label[:, None] == np.arange(scores.shape[1])
        if scores.shape[1] == 2:  # of two classes the second counts alone
            scores, positive = scores[:, 1:], positive[:, 1:]
        elif scores.shape[1] < 2:
            return lambda weights: np.nan
    orders = [np.argsort(column, kind="stable") for column in scores.T]
    starts = [np.flatnonzero(np.r_[True, np.diff(column[order]) > 0])
              for column, order in zip(scores.T, orders, strict=True)]  # fmt: skip
    marks = [column[order] for column, order in zip(positive.T, orders, strict=True)]

    def mean(weights: Array) -> float:
        return float(np.mean([_one_auroc(weights[order], mark, start)
                              for order, mark, start in zip(orders, marks, starts, strict=True)]))  # fmt: skip

    return mean


def _one_auroc(weights: Array, positive: Array, starts: Array) -> float:
    """Args are in the order of the scores; starts: where a new score begins."""
    hits = np.add.reduceat(weights * positive, starts)
    misses = np.add.reduceat(weights * ~positive, starts)
    pairs = hits.sum() * misses.sum()
    return float((hits * (np.cumsum(misses) - misses / 2)).sum() / pairs) if pairs else np.nan
