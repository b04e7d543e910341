"""From windows to questions: the best span of a window, the best window of a question, the metrics of all. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainers.records import Array

BEST = 20
"""Starts and ends that are tried with one another."""
LONGEST_ANSWER = 30
"""Tokens, as the published baselines have it."""


def best_span(starts: Array, ends: Array) -> tuple[int, int, float]:
    """First and last token of the likeliest span, and the sum of its two scores.

    Args:
        starts: [tokens], scores of beginning there.
        ends: [tokens], scores of ending there.
    """
    first = np.argsort(-starts, kind="stable")[:BEST]
    last = np.argsort(-ends, kind="stable")[:BEST]
    length = last[None, :] - first[:, None] + 1
    sums = np.where((length >= 1) & (length <= LONGEST_ANSWER), starts[first][:, None] + ends[last][None, :], -np.inf)
    row, column = np.unravel_index(int(np.argmax(sums)), sums.shape)
    if np.isneginf(sums[row, column]):  # no pair in order: the likeliest token by itself
        place = int(np.argmax(starts + ends))
        return place, place, float(starts[place] + ends[place])
    return int(first[row]), int(last[column]), float(sums[row, column])


def merge_windows(rows: Array, row_scores: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """One line a question: its best window, the least score of no answer over its windows, and the sum of its losses.

    Windows of a question stand one after the other in a shard, numbered from 0.

    Args:
        rows: int64 [windows], ascending.
        row_scores: per window, as `Extract.score` gives it.

    Returns:
        rows of the questions' first windows, and the numbers per question; `windows` counts each one's windows.
    """
    starts = np.flatnonzero(row_scores["window"] == 0)
    question = np.cumsum(row_scores["window"] == 0) - 1
    order = np.lexsort((-row_scores["score"], question))  # stable: of equals the earlier window
    best = order[np.searchsorted(question[order], np.arange(len(starts)))]
    merged = {name: values[best] for name, values in row_scores.items() if name != "window"}
    merged["loss_sum"] = np.add.reduceat(row_scores["loss_sum"], starts)
    merged["null_score"] = np.minimum.reduceat(row_scores["null_score"], starts)
    merged["windows"] = np.diff(np.append(starts, len(question)))
    return rows[starts], merged


def span_metrics(row_scores: Mapping[str, Array], threshold: float) -> dict[str, float]:
    """Exact match and F1 in percent: version 1.1's where every question has an answer, else version 2.0's.

    With unanswerable questions, "no answer" is said where its score exceeds the best span's by more than `threshold`;
    `best_f1` and `best_exact` are those at the best threshold on these very rows, as the official script has them.
    """
    answerable = row_scores["answers"] > 0
    loss = {"loss": float(row_scores["loss_sum"].sum() / row_scores["windows"].sum())}
    if answerable.all():
        return {"exact": _percent(row_scores["exact_v1"]), "f1": _percent(row_scores["f1_v1"]), **loss}
    margin, empty = row_scores["null_score"] - row_scores["score"], row_scores["empty"]
    metrics = dict(loss)
    for name in ("exact", "f1"):
        values = np.where(margin > threshold, empty, row_scores[f"{name}_v2"])
        metrics[name] = _percent(values)
        if answerable.any():
            metrics[f"{name}_answerable"] = _percent(values[answerable])
        metrics[f"{name}_unanswerable"] = _percent(values[~answerable])
        best, at = best_threshold(margin, row_scores[f"{name}_v2"], answerable)
        metrics |= {f"best_{name}": best, f"best_{name}_threshold": at}
    return metrics


def spans_said(row_scores: Mapping[str, Array], threshold: float) -> list[str]:
    """The answer to each question, empty where "no answer" is said."""
    if (row_scores["answers"] > 0).all():
        return list(row_scores["span"])
    none = row_scores["null_score"] - row_scores["score"] > threshold
    return [("" if silent else text) for silent, text in zip(none, row_scores["span"], strict=True)]


def best_threshold(margin: Array, score: Array, answerable: Array) -> tuple[float, float]:
    """The best total score over all thresholds, in percent, and the threshold that gives it.

    Begins with "no answer" to everything and gives up on it question by question, the surest answer first.
    """
    order = np.argsort(margin, kind="stable")
    gains = np.where(answerable[order], score[order], np.where(score[order] > 0, 0.0, -1.0))
    totals = np.cumsum(np.concatenate([[float((~answerable).sum())], gains]))  # in the script's order: ties round alike
    place = int(np.argmax(totals))
    at = float(margin[order[place - 1]]) if place else 0.0
    return 100.0 * float(totals[place]) / len(margin), at


def _percent(values: Array) -> float:
    return 100.0 * float(values.sum()) / len(values)
