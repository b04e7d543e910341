"""Intervals of all metrics: of each draw what scikit-learn says, in little time; and why a metric has none."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.evaluation import bootstrap
from trainers.evaluation.bootstrap import intervals_beside, percentiles, resample, resample_all
from trainers.job.sections import OwnMetric
from trainers.tasks import load_task
from trainers.tasks.options import TaskOptions

NAMES = ("a", "b", "c")


def single(random, rows, classes, ties):
    """Rows of one label each; some classes may be missing, some scores equal."""
    label, score = random.integers(0, classes, rows), random.random((rows, classes))
    score = np.round(score, 1) if ties else score
    score = (score + 0.01) / (score + 0.01).sum(1, keepdims=True)
    said = np.where(random.random(rows) < 0.5, label, random.integers(0, classes, rows))
    columns = {f"score_{index}": score[:, index] for index in range(classes)}
    return {"label": label, "prediction": said, "loss_sum": random.random(rows), **columns}


def multi(random, rows, classes, ties):
    """Rows of any number of labels."""
    truth, score = random.integers(0, 2, (rows, classes)).astype(np.int8), random.random((rows, classes))
    score = np.round(score, 1) if ties else score
    columns = {f"true_{index}": truth[:, index] for index in range(classes)}
    return {"loss_sum": random.random(rows), **columns, **{f"score_{i}": score[:, i] for i in range(classes)}}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_of_each_draw_a_classification_says_what_scikit_learn_says(seed, rows, classes, ties, several, named):
    random = np.random.default_rng(seed)
    numbers = (multi if several else single)(random, rows, classes, ties)
    task = load_task("classify", TaskOptions(multi_label=several))
    task.labels = ("a", "b", "c", "d")[:classes] if named else ()
    draws = [random.integers(0, rows, rows) for _ in range(3)]
    for rows_drawn, found in zip(draws, task.draw_metrics(numbers, draws), strict=True):
        expected = task.metrics({name: values[rows_drawn] for name, values in numbers.items()})
        assert found == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_of_each_draw_correlations_are_scipy_s(seed, rows, values, embeds):
    random = np.random.default_rng(seed)
    score, said = random.integers(0, values, rows).astype(float), np.round(random.random(rows), 1)
    numbers = {"score": score, "said": said, "loss_sum": random.random(rows)}
    task = load_task("similarity", TaskOptions(objective="cosine" if embeds else "regression"))
    draws = [np.arange(rows), *(random.integers(0, rows, rows) for _ in range(3))]
    for rows_drawn, found in zip(draws, task.draw_metrics(numbers, draws), strict=True):
        expected = task.metrics({name: column[rows_drawn] for name, column in numbers.items()})
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "auroc", "f1_macro", "recall/b"])
@pytest.mark.parametrize("rows_of", [single, multi])
def test_one_metric_alone_is_what_it_is_among_all(metric, rows_of):
    random = np.random.default_rng(1)
    numbers = rows_of(random, 60, 3, True)
    task = load_task("classify", TaskOptions(multi_label=rows_of is multi))
    task.labels = NAMES
    assert np.array_equal(resample(numbers, task, metric, 2, 20), resample_all(numbers, task, 2, 20)[metric])


def films(rows=80):
    random = np.random.default_rng(3)
    return single(random, rows, 3, False)


def test_every_metric_has_the_interval_that_it_has_alone():
    task, numbers = load_task("classify"), films()
    task.labels = NAMES
    found, without = intervals_beside(numbers, task, 5)
    assert found.keys() == task.metrics(numbers).keys() and without == {}
    for name, pair in found.items():
        draws = resample(numbers, task, name, 5, bootstrap.BESIDE)
        assert pair == percentiles(draws, 80)
        assert pair[0] < task.metric_value(name, numbers) < pair[1]


def test_many_rows_are_drawn_fewer_times(monkeypatch):
    numbers, drawn = films(), []
    task = load_task("classify")
    monkeypatch.setattr(task, "draw_metrics", lambda scores, draws: drawn.append(len(list(draws))) or [])
    for most in (10**9, 80 * 100, 1):
        monkeypatch.setattr(bootstrap, "MOST_DRAWN", most)
        intervals_beside(numbers, task, 0)
    assert drawn == [bootstrap.BESIDE, 100, bootstrap.FEWEST]


def own_task(monkeypatch, function):
    task = load_task("classify", TaskOptions(metrics={"mine": OwnMetric(function="mine.py:mine")}))
    task.labels = NAMES
    monkeypatch.setattr("trainers.tasks.metrics.own.load_metric", lambda *_: function)
    return task


def test_a_jobs_own_metric_has_an_interval_too_and_says_why_where_it_has_none(monkeypatch):
    numbers = films() | {"text": np.array(["x"] * 80, dtype=object)}

    def share(labels, predictions, texts):
        return sum(map(str.__eq__, labels, predictions)) / len(texts)

    found, without = intervals_beside(numbers, own_task(monkeypatch, share), 1)
    assert found["mine"] == pytest.approx(found["accuracy"]) and without == {}
    monkeypatch.setattr(bootstrap, "OWN_S", 0.0)
    found, without = intervals_beside(numbers, own_task(monkeypatch, share), 1)
    assert "mine" not in found and "400 resamples of" in without["mine"] and "accuracy" in found

    def needs_all(labels, predictions, texts):
        if len(set(zip(labels, texts, strict=True))) < 80:
            raise ValueError("a row is missing")
        return 1.0

    monkeypatch.setattr(bootstrap, "OWN_S", 60.0)
    numbers["text"] = np.array([f"row {number}" for number in range(80)], dtype=object)
    found, without = intervals_beside(numbers, own_task(monkeypatch, needs_all), 1)
    assert "mine" not in found and without == {"mine": "no interval: no resample defines it"}


def test_a_pause_while_a_jobs_own_metric_is_timed_costs_no_interval(monkeypatch):
    """Another process had its turn: the first call takes as long as a metric may not."""
    numbers, calls = films() | {"text": np.array(["x"] * 80, dtype=object)}, []

    def paused(labels, predictions, texts):
        calls.append(len(texts))
        if len(calls) == 1:
            time.sleep(2 * bootstrap.OWN_S / bootstrap.BESIDE)
        return 1.0

    found, without = intervals_beside(numbers, own_task(monkeypatch, paused), 1)
    assert found["mine"] == (1.0, 1.0) and without == {}

    def slow(labels, predictions, texts):
        calls.append(len(texts))
        time.sleep(0.3)
        return 1.0

    calls.clear()
    assert "mine" in intervals_beside(numbers, own_task(monkeypatch, slow), 1)[1]
    assert len(calls) <= 3, "what is slow is not timed for long"


def test_a_metric_that_no_resample_defines_says_so():
    same = {"score": np.ones(4), "said": np.arange(4.0), "loss_sum": np.ones(4)}
    assert np.isnan(resample(same, load_task("similarity"), "pearson", 0, 20)).all()
    assert "pearson" not in resample_all(same, load_task("similarity"), 0, 20)


def test_of_few_rows_the_interval_is_wider_and_of_many_it_is_the_percentiles_own():
    draws = np.arange(10_001.0)
    assert percentiles(draws, 10**6) == pytest.approx((250, 9750), abs=0.1)
    low, high = percentiles(draws, 40)
    assert (low, high) == pytest.approx((202.6, 9797.4), abs=0.1)  # Φ(-√(40/39) · t(39; 0.975)) is 2.026 %
    assert percentiles(draws, 1) == (0, 10_000)
