"""Promotion: what is better beyond luck is promoted, what cannot be compared is not."""

import time

import numpy as np
import pytest

from orchestrator.registry.bootstrap import compare
from orchestrator.registry.promotion import RowScores, chance_baselines, decide, pretrained_baseline
from trainers.errors import EvaluationError
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


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "mcc", "loss"])
def test_a_model_no_better_than_chance_is_not_promoted_though_there_is_no_champion(metric):
    def against_chance(candidate):
        mode = "min" if metric == "loss" else "max"
        chance = chance_baselines(candidate, 1)
        return decide("if_better", candidate, None, load_task("classify"), metric, mode, 0, chance, RESAMPLES)

    guesses = row_scores(0.25, 1, loss_sum=np.full(ROWS, np.log(4) + 0.01))
    refused = against_chance(guesses)
    assert not refused.promote and "does not beat" in refused.reason
    assert "of the majority class" in refused.reason or "of guesses by the labels' shares" in refused.reason
    accepted = against_chance(row_scores(0.5, 1, loss_sum=np.full(ROWS, 1.0)))
    assert accepted.promote and "no champion yet, and" in accepted.reason


def test_chance_is_only_known_of_rows_with_one_label():
    assert chance_baselines(RowScores("step 1", "k", {"row": np.arange(3), "loss_sum": np.ones(3)}), 0) == []


def test_a_model_no_better_than_the_pretrained_one_is_not_promoted(tmp_path):
    run, task = Folder(str(tmp_path)), load_task("pretrain")
    random = np.random.default_rng(0)
    before = {"loss_sum": random.random(50) + 2, "targets": np.full(50, 10), "correct": np.full(50, 3),
              "bytes": np.full(50, 40)}  # fmt: skip

    def scores(change):
        return RowScores("step 5", "k", {"row": np.arange(50), **before, "loss_sum": before["loss_sum"] + change})

    assert pretrained_baseline(run, scores(0)) == []  # it was not evaluated
    write_row_scores(run, 0, np.arange(50), before)
    for change, promoted in ((0.0, False), (0.5, False), (-0.5, True)):
        candidate = scores(change)
        decision = decide("if_better", candidate, None, task, "loss", "min", 0, pretrained_baseline(run, candidate))
        assert decision.promote is promoted
        assert "of the pretrained model" in decision.reason


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
        first, second = ({"row": np.arange(400), "loss_sum": random.gamma(2, mean / 2, 400)} for mean in (0.85, 0.80))
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


@pytest.mark.parametrize(
    "other, says", [([2.0, 1.9, 2.1, 0.5], "paired resamples"), ([2.0] * 4, "undefined for the pretrained model")]
)
def test_draws_of_equal_scores_leave_a_correlation_undefined_and_do_not_count(other, says):
    """Of four rows with one other score every third draw or so has none of it."""
    task = load_task("similarity")
    candidate = similarity_rows([1.1, 0.9, 1.0, 4.8])
    decision = decide("if_better", candidate, None, task, "spearman", "max", 0, [similarity_rows(other)], RESAMPLES)
    assert decision.promote and says in decision.reason
