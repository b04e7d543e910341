"""Promotion: what is better beyond luck is promoted, what cannot be compared is not."""

import time

import numpy as np
import pytest

from orchestrator.registry.promotion import RowScores, decide
from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import compare, share_by_luck
from trainers.run.row_scores import read_row_scores, write_row_scores
from trainers.storage import Folder
from trainers.tasks import load_task

ROWS, RESAMPLES = 2000, 200


def predictions(accuracy, seed, rows=ROWS, classes=4):
    """Row scores of a classifier that is right with this probability, on labels shared by all seeds."""
    labels = np.random.default_rng(7).integers(0, classes, rows)
    random = np.random.default_rng(seed)
    wrong = (labels + random.integers(1, classes, rows)) % classes
    guesses = np.where(random.random(rows) < accuracy, labels, wrong)
    return {"row": np.arange(rows), "label": labels, "prediction": guesses, "loss_sum": random.random(rows)}


def row_scores(accuracy, seed, key="k", **change):
    return RowScores(f"model {seed}", key, {**predictions(accuracy, seed), **change})


def choose(candidate, champion, rule="if_better", metric="accuracy", mode="max"):
    return decide(rule, candidate, champion, load_task("classify"), metric, mode, seed=0, resamples=RESAMPLES)


def test_the_first_version_becomes_champion():
    assert choose(row_scores(0.5, 1), None).promote


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "mcc"])
def test_a_clearly_better_model_is_promoted_and_the_reason_gives_the_numbers(metric):
    decision = choose(row_scores(0.9, 1), row_scores(0.8, 2), metric=metric)
    assert decision.promote
    assert metric in decision.reason
    assert "2,000 rows" in decision.reason


def test_a_worse_model_is_not_promoted():
    assert not choose(row_scores(0.8, 1), row_scores(0.9, 2)).promote


def test_a_difference_within_luck_is_not_promoted():
    better, worse = row_scores(0.805, 1), row_scores(0.8, 3)
    right = [(one.numbers["label"] == one.numbers["prediction"]).mean() for one in (better, worse)]
    assert right[0] > right[1]
    assert not choose(better, worse).promote


def test_the_same_model_again_is_not_promoted():
    assert not choose(row_scores(0.8, 1), row_scores(0.8, 1)).promote


def test_smaller_is_better_by_mode():
    low = row_scores(0.8, 1, loss_sum=np.random.default_rng(1).random(ROWS) * 0.5)
    high = row_scores(0.8, 2)
    assert choose(low, high, metric="loss", mode="min").promote
    assert not choose(high, low, metric="loss", mode="min").promote


def test_other_evaluation_data_is_never_promoted_and_the_remedy_is_named():
    decision = choose(row_scores(0.9, 1, key="new"), row_scores(0.1, 2, key="old"))
    assert not decision.promote
    assert "registry.promote: always" in decision.reason
    assert "old" in decision.reason


def test_a_champion_whose_rows_are_gone_is_not_replaced():
    decision = choose(row_scores(0.9, 1), RowScores("version 1", "k", {}))
    assert not decision.promote
    assert "version 1" in decision.reason


def test_other_rows_are_not_compared():
    assert not choose(row_scores(0.9, 1), row_scores(0.1, 2, row=np.arange(ROWS) + 1)).promote


def test_rules_always_and_never_ask_nothing():
    assert choose(row_scores(0.1, 1), row_scores(0.9, 2), rule="always").promote
    assert not choose(row_scores(0.9, 1), None, rule="never").promote


def test_the_interval_covers_the_true_difference_about_19_times_in_20():
    covered, random = 0, np.random.default_rng(0)
    for seed in range(100):
        said = dict.fromkeys(("label", "prediction"), np.arange(400) % 3)
        first, second = ({**said, "loss_sum": random.gamma(2, mean / 2, 400)} for mean in (0.85, 0.80))
        found = compare(first, second, load_task("classify"), "loss", seed, resamples=300)
        covered += found.low <= 0.05 <= found.high
    assert 88 <= covered <= 100


def test_ten_thousand_rows_take_seconds():
    first, second = predictions(0.9, 1, 10_000, 20), predictions(0.8, 2, 10_000, 20)
    begun = time.process_time()
    compare(first, second, load_task("classify"), "f1_macro", 0, resamples=100)
    assert time.process_time() - begun < 3  # of a thousand draws: 30 s; all metrics each time take 60


def test_row_scores_come_back_sorted_and_equal(tmp_path):
    run, rows = Folder(str(tmp_path)), np.array([3, 0, 2, 1])
    write_row_scores(run, 40, rows, {"label": rows * 10, "loss_sum": rows / 3})
    back = read_row_scores(run, 40)
    assert back["row"].tolist() == [0, 1, 2, 3]
    assert back["label"].tolist() == [0, 10, 20, 30]
    np.testing.assert_array_equal(back["loss_sum"], np.arange(4) / 3)


def test_row_scores_twice_or_missing_are_refused(tmp_path):
    run = Folder(str(tmp_path))
    with pytest.raises(EvaluationError, match=r"more than once: \[1\]"):
        write_row_scores(run, 1, np.array([1, 1, 2]), {"label": np.zeros(3)})
    with pytest.raises(EvaluationError, match="length"):
        write_row_scores(run, 1, np.array([1, 2]), {"label": np.zeros(3)})
    with pytest.raises(EvaluationError, match="tuneyard evaluate"):
        read_row_scores(run, 1)
    run.write_bytes("evals/step-00000001.arrow", b"torn")
    with pytest.raises(EvaluationError, match="damaged"):
        read_row_scores(run, 1)


def similarity_rows(said):
    score = np.array([1.0, 1.0, 1.0, 5.0])
    numbers = {"row": np.arange(4), "score": score, "said": np.asarray(said), "loss_sum": (score - said) ** 2}
    return RowScores("the pretrained model", "k", numbers)


@pytest.mark.parametrize("said, promoted", [([1.1, 0.9, 1.0, 4.8], True), ([2.0, 1.9, 2.1, 0.5], False)])
def test_beside_equal_answers_a_correlation_must_be_above_zero(said, promoted):
    """Of four rows with one other score every third draw or so leaves the correlation undefined and does not count."""
    task, candidate = load_task("similarity"), similarity_rows(said)
    for other in ([2.0] * 4, task.guesses(candidate.numbers, 0)["the mean score"]["said"]):
        decision = decide("if_better", candidate, None, task, "spearman", "max", 0, [similarity_rows(other)], RESAMPLES)
        assert decision.promote is promoted and "undefined for the pretrained model" in decision.reason
    against = [similarity_rows([2.0, 1.9, 2.1, 0.5])]
    decision = decide("if_better", candidate, None, task, "spearman", "max", 0, against, RESAMPLES)
    assert not decision.promote and "paired resamples" in decision.reason
    assert ("differ so by luck" in decision.reason) is promoted  # four rows can be swapped in 16 ways, too few


def test_of_equally_good_models_with_skewed_losses_and_few_rows_no_more_are_promoted_than_stated():
    """By the bootstrap alone 6 % of such pairs were, where 2.5 % are stated."""
    task, random, wins = load_task("pretrain"), np.random.default_rng(0), 0
    for pair in range(300):
        targets = random.integers(1, 400, 40)
        sides = [{"loss_sum": random.lognormal(0, 1.5, 40) * targets, "targets": targets, "correct": targets,
                  "bytes": targets, "row": np.arange(40)} for _ in range(2)]  # fmt: skip
        first, second = (RowScores("one", "key", numbers) for numbers in sides)
        wins += decide("if_better", first, second, task, "loss", "min", pair, resamples=200).promote
    assert wins <= 14  # of 300 at 2.5 % more come once in 100 tries


def test_a_model_that_is_clearly_better_stands_apart_from_every_swap():
    rows = np.arange(100)
    right, half = ({"label": rows % 3, "prediction": said, "loss_sum": rows / 100.0}
                   for said in (rows % 3, np.where(rows % 2, rows % 3, 0)))  # fmt: skip
    task = load_task("classify")
    assert share_by_luck(right, half, task, "accuracy", "max", 0, 200) == pytest.approx(1 / 201)
    assert share_by_luck(half, right, task, "accuracy", "max", 0, 200) == 1.0
    assert share_by_luck(right, right, task, "accuracy", "max", 0, 200) == 1.0
