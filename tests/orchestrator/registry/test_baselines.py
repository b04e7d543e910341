"""In every task a model no better than what needs no training does not become champion."""

import math

import numpy as np
import pytest

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.registry.promotion import RowScores, baselines_of, decide
from tests.trainers.tasks.small import small_jobs, with_head
from trainers.evaluation.evaluate import evaluate_model
from trainers.run.record import find_run
from trainers.run.row_scores import write_row_scores
from trainers.storage import Folder
from trainers.tasks import load_task

NAMES = {
    "classify causal": ("the majority class", "guesses by the labels' shares"),
    "several": ("the labels that most rows have", "every label"),
    "tag": ("the majority tag (O)",),
    "extract": ("no answer",),
    "extract v2": ("no answer",),
    "regression": ("the mean score",),
    "cosine": ("the mean score", "the pretrained model"),
    "T5": ("the pretrained model",),
    "sft": ("the pretrained model",),
    "pretrain": ("the pretrained model",),
    "mlm": ("the pretrained model",),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return small_jobs(tmp_path_factory.mktemp("baselines"))


@pytest.mark.parametrize("name", NAMES)
def test_what_says_the_same_as_its_baseline_is_never_promoted(jobs, tmp_path, name):
    run, folder = find_run(jobs[name]), Folder(str(tmp_path / "run"))
    task, model = run.load_task(), str(with_head(run, tmp_path / "model"))
    rows, numbers = evaluate_model(run.job, task, model, run.open_shards("eval", task))
    candidate = RowScores("step 5", "k", {"row": rows, **numbers})
    if not task.new_head:
        write_row_scores(folder, 0, rows, numbers)
    baselines = baselines_of(folder, candidate, task, seed=0)
    assert tuple(one.name for one in baselines) == NAMES[name]
    for metric in set(task.metrics_known) & set(task.metrics(numbers)):
        for one in baselines:
            value = task.metric_value(metric, one.numbers)
            if math.isfinite(value):
                same = RowScores("step 5", "k", one.numbers)
                decision = decide("if_better", same, None, task, metric, task.better_mode(metric), 0, baselines, 50)
                assert not decision.promote and "does not beat" in decision.reason


def test_the_pretrained_model_is_evaluated_where_it_is_a_baseline(jobs):
    waiting = {name: EvaluationPool(find_run(jobs[name]), 0).waiting() for name in NAMES}
    assert waiting == {name: [0] if "the pretrained model" in NAMES[name] else [] for name in NAMES}


def scores(change):
    before = {"loss_sum": np.random.default_rng(0).random(50) + 2, "targets": np.full(50, 10)}
    more = {"correct": np.full(50, 3), "bytes": np.full(50, 40)}
    return RowScores("step 5", "k", {"row": np.arange(50), **more, **before, "loss_sum": before["loss_sum"] + change})


@pytest.mark.parametrize("change, promoted", [(0.0, False), (0.5, False), (-0.5, True)])
def test_a_model_must_beat_the_pretrained_one(tmp_path, change, promoted):
    run, task, candidate = Folder(str(tmp_path)), load_task("pretrain"), scores(change)
    missing = decide("if_better", candidate, None, task, "loss", "min", 0, baselines_of(run, candidate, task, 0), 50)
    assert not missing.promote and "no evaluation rows of the pretrained model" in missing.reason
    pretrained = {name: values for name, values in scores(0).numbers.items() if name != "row"}
    write_row_scores(run, 0, np.arange(50), pretrained)
    decision = decide("if_better", candidate, None, task, "loss", "min", 0, baselines_of(run, candidate, task, 0))
    assert decision.promote is promoted and "of the pretrained model" in decision.reason


def labelled(right):
    """500 rows of four classes; a share of them said right, the others drawn."""
    random = np.random.default_rng(1)
    label = random.integers(0, 4, 500)
    said = np.where(random.random(500) < right, label, random.integers(0, 4, 500))
    loss = np.full(500, 1.0 if right else np.log(4) + 0.01)
    return RowScores("step 5", "k", {"row": np.arange(500), "label": label, "prediction": said, "loss_sum": loss})


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "mcc", "loss"])
@pytest.mark.parametrize("right, promoted", [(0.0, False), (0.4, True)])
def test_a_classifier_must_beat_chance(tmp_path, metric, right, promoted):
    task, candidate = load_task("classify"), labelled(right)
    baselines = baselines_of(Folder(str(tmp_path)), candidate, task, seed=1)
    decision = decide("if_better", candidate, None, task, metric, task.better_mode(metric), 0, baselines, 200)
    assert decision.promote is promoted
    assert "of the majority class" in decision.reason or "of guesses by the labels' shares" in decision.reason
