"""A quantized model is kept where the rows rule out a loss above the allowance, not where none was seen."""

import numpy as np
import pytest

from orchestrator.exporting.verdict import judge
from trainers.errors import EvaluationError
from trainers.records import Array
from trainers.tasks import load_task


def answers(right: Array) -> dict[str, Array]:
    """Per-row numbers of a classifier of two classes."""
    labels = np.arange(len(right)) % 2
    return {"label": labels, "prediction": np.where(right, labels, 1 - labels), "loss_sum": 1.0 - 0.5 * right}


def classifier() -> object:
    task = load_task("classify")
    task.labels = ("no", "yes")
    return task


RIGHT = np.arange(400) % 10 > 0


def test_the_same_answers_are_kept_without_any_allowance() -> None:
    found = judge(answers(RIGHT), answers(RIGHT), classifier(), "accuracy", "max", 0.0, seed=0)
    assert found.kept and (found.difference, found.low, found.high) == (0, 0, 0)
    assert "kept: accuracy 0.9, before 0.9" in found.reason


def test_a_loss_that_few_rows_cannot_rule_out_is_refused_and_many_rows_clear_it() -> None:
    worse = RIGHT.copy()
    worse[11] = False  # one row in 400 is 0.25 points, of 2 that are allowed
    assert judge(answers(worse), answers(RIGHT), classifier(), "accuracy", "max", 0.02, seed=0).kept
    few = judge(answers(worse[:40]), answers(RIGHT[:40]), classifier(), "accuracy", "max", 0.02, seed=0)
    assert not few.kept and few.low < -few.allowance and "cannot be ruled out" in few.reason


def test_what_is_better_small_may_not_grow_and_what_is_no_number_is_refused() -> None:
    more = answers(RIGHT) | {"loss_sum": answers(RIGHT)["loss_sum"] * 1.05}
    assert not judge(more, answers(RIGHT), classifier(), "loss", "min", 0.01, seed=0).kept
    assert judge(more, answers(RIGHT), classifier(), "loss", "min", 0.06, seed=0).kept
    assert judge(answers(RIGHT), more, classifier(), "loss", "min", 0.0, seed=0).kept
    broken = more | {"loss_sum": np.full(400, np.nan)}
    found = judge(broken, answers(RIGHT), classifier(), "loss", "min", 0.5, seed=0)
    assert not found.kept and found.quantized is None and "refused: loss is nan" in found.reason
    with pytest.raises(EvaluationError, match="nothing can be judged"):
        judge(answers(RIGHT), broken, classifier(), "loss", "min", 0.5, seed=0)
