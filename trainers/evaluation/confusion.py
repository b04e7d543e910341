"""The confusion matrix of an evaluation as a picture, for TensorBoard."""

from typing import Any

import numpy as np

from trainers.errors import EvaluationError
from trainers.records import Array
from trainers.run.row_scores import read_labels, read_row_scores
from trainers.storage import Folder

MOST_CLASSES = 40
"""A larger matrix cannot be read."""


def draw_confusion(run: Folder, step: int) -> Any:
    """A matplotlib figure, or None where the evaluation is not of a single-label classification of few classes."""
    try:
        row_scores = read_row_scores(run, step)
    except EvaluationError:
        return None
    if "label" not in row_scores or "prediction" not in row_scores:
        return None
    names = read_labels(run, step)
    size = max(len(names), int(row_scores["label"].max()) + 1, int(row_scores["prediction"].max()) + 1)
    if size > MOST_CLASSES:
        return None
    counts = count_pairs(row_scores["label"], row_scores["prediction"], size)
    return _figure(counts, [*names, *map(str, range(len(names), size))])


def count_pairs(label: Array, prediction: Array, size: int) -> Array:
    """int64 [true, predicted]."""
    counts: Array = np.bincount(label * size + prediction, minlength=size * size).reshape(size, size)
    return counts


def _figure(counts: Array, names: list[str]) -> Any:
    from matplotlib.figure import Figure

    size = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cell = max(0.36, 0.1 * len(str(counts.max())))  # inches; TensorBoard shows the picture some 300 pixels wide
    figure = Figure(figsize=(1.6 + cell * size, 1.4 + cell * size), dpi=180, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), names, rotation=45, ha="right")
    axes.set_yticks(range(size), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for true, said in np.ndindex(size, size):
        colour = "white" if shares[true, said] > 0.5 else "black"
        axes.text(said, true, str(counts[true, said] or ""), ha="center", va="center", color=colour)
    return figure
