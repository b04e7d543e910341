"""Metrics that a job brings: a Python function of labels, predictions and texts, one entry a row, in the rows' order.

| task | labels | predictions |
| --- | --- | --- |
| classify | names; of several labels lists of names | the same |
| tag | lists of tags | the same |
| extract | lists of accepted answers | a text, empty for no answer |
| similarity | scores | scores |
| seq2seq, sft with generate | texts | texts |
| pretrain, mlm, sft | None | None |
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trainers.errors import EvaluationError, JobError
from trainers.records import Array
from trainers.tasks.metrics.classes import THRESHOLD
from trainers.tasks.metrics.spans import spans_said
from trainers.tasks.options import TaskOptions

TEXT, TRUTH = "text", "truth"
"""Columns that evaluations keep for these metrics alone: what the model read, and the label as JSON where no other
column has it."""


@lru_cache
def load_metric(name: str, where: str) -> Callable[..., Any]:
    """The function at FILE.py:NAME or MODULE:NAME. Raises JobError where it is not there."""
    place, _, attribute = where.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"metric_{Path(place).stem}", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except Exception as error:  # it is the user's code
        raise JobError(
            f"evaluate.metrics.{name}: {where} cannot be loaded ({type(error).__name__}: {error}); name FILE.py:NAME "
            "or MODULE:NAME"
        ) from error
    if not callable(function):
        raise JobError(f"evaluate.metrics.{name}: {where} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def own_value(name: str, options: TaskOptions, labels: Sequence[str], row_scores: Mapping[str, Array]) -> float:
    """One of these metrics over rows. Raises EvaluationError where the function fails or gives no number."""
    where = options.metrics[name].function
    function = load_metric(name, where)
    if TEXT not in row_scores:
        raise EvaluationError(f"evaluate.metrics.{name}: these rows were scored without it; `tuneyard evaluate` does")
    arguments = (
        _truths(row_scores, labels),
        _predictions(row_scores, labels, options.no_answer_threshold),
        row_scores[TEXT].tolist(),
    )
    try:
        value = function(*arguments)
    except Exception as error:
        raise EvaluationError(f"evaluate.metrics.{name}: {where} raised {type(error).__name__}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise EvaluationError(f"evaluate.metrics.{name}: {where} gave {value!r}, which is no number")
    return float(value)


def truth_column(options: TaskOptions, truths: Sequence[Any]) -> dict[str, Array]:
    """Labels that no other column has, where a metric of the job's own asks for them."""
    return {TRUTH: np.array(list(map(json.dumps, truths)), dtype=object)} if options.metrics else {}


def _truths(row_scores: Mapping[str, Array], labels: Sequence[str]) -> list[Any]:
    if TRUTH in row_scores:
        return _decoded(row_scores[TRUTH])
    if "label" in row_scores:
        return [labels[index] for index in row_scores["label"]]
    if "true_0" in row_scores:
        return _several(row_scores, labels, "true_")
    if "true_tags" in row_scores:
        return _decoded(row_scores["true_tags"])
    return row_scores["score"].tolist() if "score" in row_scores else [None] * len(row_scores[TEXT])


def _predictions(row_scores: Mapping[str, Array], labels: Sequence[str], threshold: float) -> list[Any]:
    if "prediction" in row_scores:
        return [labels[index] for index in row_scores["prediction"]]
    if "true_0" in row_scores:
        return _several(row_scores, labels, "score_")
    if "said_tags" in row_scores:
        return _decoded(row_scores["said_tags"])
    if "span" in row_scores:
        return spans_said(row_scores, threshold)
    return row_scores["said"].tolist() if "said" in row_scores else [None] * len(row_scores[TEXT])


def _several(row_scores: Mapping[str, Array], labels: Sequence[str], prefix: str) -> list[list[str]]:
    given = np.stack([row_scores[f"{prefix}{index}"] for index in range(len(labels))], axis=1) >= THRESHOLD
    return [[labels[int(index)] for index in np.flatnonzero(line)] for line in given]


def _decoded(texts: Array) -> list[Any]:
    return [json.loads(text) for text in texts]
