"""What answers score that need no reading, from the same numbers a row: a model must beat them. Pure.

Shares are those of the evaluation rows themselves, so that each is as good as such an answer can be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trainers.errors import EvaluationError
from trainers.records import Array
from trainers.tasks.metrics.entities import entity_counts

RowScores = Mapping[str, Array]
Guesses = dict[str, dict[str, Array]]
"""Row scores by what is said to every row."""


def guess_class(numbers: RowScores, seed: int) -> Guesses:
    """The most frequent class, and classes drawn by their shares."""
    label = numbers["label"]
    shares = np.bincount(label) / len(label)
    columns = {"loss_sum": -np.log(shares[label])}
    for name in numbers:
        if name.startswith("score_"):
            index = int(name.removeprefix("score_"))
            columns[name] = np.full(len(label), shares[index] if index < len(shares) else 0.0)
    drawn = np.random.default_rng(seed).choice(len(shares), len(label), p=shares)
    said = {"the majority class": np.full(len(label), shares.argmax()), "guesses by the labels' shares": drawn}
    return {name: {**numbers, **columns, "prediction": prediction} for name, prediction in said.items()}


def guess_labels(numbers: RowScores) -> Guesses:
    """Where a row has any number of labels: those that most rows have, and all of them."""
    truth = np.stack([numbers[f"true_{index}"] for index in range(_count(numbers, "true_"))], axis=1)
    shares = truth.mean(0)
    cost = np.log(np.where(truth == 1, shares, 1 - shares))  # a label that all rows have, or none, costs log 1
    constants = {"the labels that most rows have": shares, "every label": np.ones_like(shares)}
    return {
        said: {
            **numbers,
            "loss_sum": -cost.mean(1),
            **{f"score_{index}": np.full(len(truth), value) for index, value in enumerate(values)},
        }
        for said, values in constants.items()
    }


def guess_tag(numbers: RowScores, labels: Sequence[str]) -> Guesses:
    """The most frequent tag for every word."""
    if "true_tags" not in numbers:
        raise EvaluationError("these rows were scored without their tags; `tuneyard evaluate` scores them again")
    truth = [json.loads(tags) for tags in numbers["true_tags"]]
    counts = Counter(tag for tags in truth for tag in tags)
    tag, total = max(counts, key=lambda name: (counts[name], name)), counts.total()
    said = [[tag] * len(tags) for tags in truth]
    read = zip(truth, numbers["targets"], strict=True)  # words that truncation cut off stand last
    losses = [-sum(np.log(counts[name] / total) for name in tags[:most]) for tags, most in read]
    columns = {
        "loss_sum": np.array(losses),
        "words_right": np.array([tags.count(tag) for tags in truth]),
        "said_tags": np.array(list(map(json.dumps, said)), dtype=object),
    }
    return {f"the majority tag ({tag})": {**numbers, **columns, **entity_counts(truth, said, labels)}}


def guess_no_answer(numbers: RowScores) -> Guesses:
    """No answer to any question; of its loss nothing is known."""
    zeros = np.zeros(len(numbers["score"]))
    columns = dict.fromkeys(("score", "exact_v1", "f1_v1", "exact_v2", "f1_v2"), zeros)
    columns |= {"null_score": zeros + np.inf, "loss_sum": zeros + np.nan, "span": np.full(len(zeros), "", dtype=object)}
    return {"no answer": {**numbers, **columns}}


def _count(numbers: RowScores, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in numbers)
