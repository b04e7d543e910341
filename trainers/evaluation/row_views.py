"""Evaluation rows as a person reads them: text, label, prediction, loss and where each row came from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.errors import EvaluationError
from trainers.records import Array, Record
from trainers.run.record import Run
from trainers.run.row_scores import ROW, read_row_scores
from trainers.sources.place import place_of
from trainers.tasks import Task
from trainers.tasks.base import Example
from trainers.tasks.metrics.spans import spans_said
from trainers.tokenizer.encoder import load_encoder

MOST_CHARS = 400
"""A longer text is cut in its middle."""


class RowView(Record):
    """One evaluation row and what a checkpoint said to it."""

    file: str
    row: int
    """As the ledger names it: the byte offset of a line, or the number of a row."""
    place: str = ""
    """For people: the file's name and line, as an editor counts, where the file is at hand."""
    text: str
    """What the model read, decoded from its tokens."""
    label: str
    prediction: str
    loss: float
    """Mean over the row's targets."""


def costliest_rows(run: Run, step: int, most: int) -> list[RowView]:
    """The evaluation rows with the largest loss a target, largest first.

    Raises:
        EvaluationError: where the rows of that evaluation cannot be read any more.
        DataError: where the evaluation shards cannot.
    """
    numbers = read_row_scores(run.folder, step)
    losses = row_losses(numbers)
    order = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:most]
    return _views(run, numbers, losses, order.tolist())


def generations(run: Run, step: int, most: int) -> list[RowView]:
    """The first rows of a task that generates texts; empty for the others. Raises as `costliest_rows` does."""
    numbers = read_row_scores(run.folder, step)
    if "said" not in numbers or numbers["said"].dtype != object:
        return []
    return _views(run, numbers, row_losses(numbers), range(min(most, len(numbers[ROW]))))


def row_losses(numbers: Mapping[str, Array]) -> Array:
    """Loss of each row, float64 [rows]: the mean over its targets where it has several."""
    if "loss_sum" not in numbers:
        raise EvaluationError("the evaluation kept no loss of its rows")
    losses: Array = numbers["loss_sum"] / np.maximum(numbers.get("targets", np.ones(1)), 1)
    return losses


def _views(run: Run, numbers: Mapping[str, Array], losses: Array, places: Sequence[int]) -> list[RowView]:
    task = run.load_task()
    shards, tokenizer = run.open_shards("eval", task), load_encoder(run.model.path).tokenizer
    views = []
    for place in places:
        index = int(numbers[ROW][place])
        example = shards.row(index)
        file, row, _ = shards.origin(index)
        label, prediction = _label_and_prediction(task, example, numbers, place, tokenizer)
        views.append(
            RowView(
                file=str(file),
                row=row,
                place=place_of(str(file), row, run.job.data.format),
                text=_short(tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=True)),
                label=_short(label),
                prediction=_short(prediction),
                loss=float(losses[place]),
            )
        )
    return views


def _label_and_prediction(
    task: Task, example: Example, numbers: Mapping[str, Array], place: int, tokenizer: Any
) -> tuple[str, str]:
    extra = example.extra
    if {"label", "prediction"} <= numbers.keys():
        names = dict(enumerate(task.labels))
        label, prediction = int(numbers["label"][place]), int(numbers["prediction"][place])
        return names.get(label, str(label)), names.get(prediction, str(prediction))
    if "true_0" in numbers:
        chosen = [name for i, name in enumerate(task.labels) if numbers[f"score_{i}"][place] >= 0.5]
        return ", ".join(extra["several"]), ", ".join(chosen)
    if "said_tags" in numbers:
        true, said = (" ".join(json.loads(numbers[name][place])) for name in ("true_tags", "said_tags"))
        return true, said
    if "span" in numbers:
        return " | ".join(extra["answers"]), spans_said(numbers, task.options.no_answer_threshold)[place]
    said = numbers["said"][place] if "said" in numbers else ""
    if "score" in numbers:
        return f"{numbers['score'][place]:.3g}", f"{said:.3g}"
    if "spans" in extra:
        start, end = extra["spans"][-2:]
        return tokenizer.decode(example.input_ids[start:end].tolist(), skip_special_tokens=True), str(said)
    return str(extra.get("reference", "")), str(said)


def _short(text: str) -> str:
    text = " ".join(str(text).split())
    half = MOST_CHARS // 2
    return text if len(text) <= MOST_CHARS else f"{text[:half]} … {text[-half:]}"
