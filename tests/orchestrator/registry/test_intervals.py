"""Intervals of all metrics at once are those of each alone, and stand with the baselines under the evaluations."""

import numpy as np
import pytest

from orchestrator.registry.bootstrap import all_intervals, metric_interval
from orchestrator.report.tables import evaluation_table
from trainers.run.folder import Evaluation
from trainers.tasks import load_task


def scores():
    random = np.random.default_rng(3)
    label = random.integers(0, 3, 60)
    said = np.where(random.random(60) < 0.6, label, random.integers(0, 3, 60))
    return {"label": label, "prediction": said, "loss_sum": random.random(60)}


def test_every_metric_has_the_interval_that_it_has_alone():
    task, numbers = load_task("classify"), scores()
    task.labels = ("a", "b", "c")
    found = all_intervals(numbers, task, 5, 100)
    assert found.keys() >= set(task.metrics(numbers)) and {"f1_macro", "loss", "f1/a"} <= found.keys()
    for name, (low, high) in found.items():
        assert (low, high) == pytest.approx(metric_interval(numbers, task, name, 5, 100))
        assert low < task.metric_value(name, numbers) < high


def test_intervals_and_baselines_stand_below_the_steps():
    task, numbers = load_task("classify"), scores()
    done = [Evaluation(step=5, status="done", metrics=task.metrics(numbers), eval_key="k")]
    guesses = {name: task.metrics(guess) for name, guess in task.guesses(numbers, 0).items()}
    intervals = all_intervals(numbers, task, 0, 50)
    table = evaluation_table(done, "accuracy", 5, 3, intervals, guesses)
    place, state = table.columns.index("accuracy"), {row[0]: row for row in table.rows}
    assert [state[f"best, 95 % {end}"][place] for end in ("from", "to")] == list(intervals["accuracy"])
    majority = np.bincount(numbers["label"]).max() / 60
    assert state["the majority class"][place] == pytest.approx(majority)
    assert len({len(row) for row in table.rows}) == 1
    whole = evaluation_table(done, "accuracy", 5, None, intervals, guesses)
    assert len({len(row) for row in whole.rows}) == 1
    assert [row[0] for row in whole.rows[1:]] == [row[0] for row in table.rows[1:]]
