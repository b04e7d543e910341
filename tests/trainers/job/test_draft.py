"""A job file with a wrong value: everything else of it is still looked at."""

from typing import Any

import pytest

from tests.trainers.job.test_job import changed
from trainers.errors import DataError, JobError, from_record, to_record
from trainers.job.draft import Checks, Draft
from trainers.job.load import draft_job, parse_job


def draft(raw: dict[str, Any]) -> Draft:
    return draft_job(raw, "job.yaml", None)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"train": {"learning_rate": "fast"}}, ["train.learning_rate"]),
        ({"scale": {"workers": {"min": "x"}}}, ["scale.workers"]),
        ({"scale": {"workers": {"min": 5, "max": 2}}}, ["scale.workers"]),
        ({"scale": {"workerz": 3}}, ["scale.workerz", "scale.workers"]),
        ({"data": {"train": [1]}}, ["data.train"]),
        ({"data": {"eval_sets": {"new": 3}}}, ["data.eval_sets.new"]),
        ({"train": 5}, ["train"]),
        ({"model": {"path": None}}, ["model.path"]),
        ({"name": "a b"}, ["name"]),
        ({"train": {"distill": {"temperature": 2.0}}}, ["train.distill"]),
        (
            {"train": {"distill": {"temprature": 2.0}}},
            ["train.distill.temprature", "train.distill", "train.distill.temperature"],
        ),
    ],
)
def test_a_wrong_value_gives_way_and_the_rest_stays(change: dict[str, Any], broken: list[str]) -> None:
    found = draft(changed(**change))
    assert found.job is not None
    assert set(found.broken) == set(broken)
    assert found.problems
    with pytest.raises(JobError):
        found.require()
    kept = {"name", "data", "train", "model", "scale"} - {place.partition(".")[0] for place in broken}
    good = parse_job(changed())
    assert all(getattr(found.job, section) == getattr(good, section) for section in kept)


def test_nothing_is_made_of_a_job_without_a_task() -> None:
    assert draft(changed(task="clasify")).job is None


def test_a_check_that_needs_a_broken_value_is_passed_over_and_named() -> None:
    check = Checks(draft(changed(scale={"workers": 0}, train={"stpes": 4})))
    asked: list[str] = []

    def refuse() -> None:
        asked.append("metric")
        raise JobError("evaluate.metric: no such metric")

    assert check("batch sizes", ["scale.workers", "train.global_batch_size"], lambda: asked.append("batch")) is None
    assert check("the schedule", ["train.steps"], lambda: asked.append("steps")) is None
    assert check("the name", ["name"], lambda: "yes") == "yes"
    check("the metric", ["evaluate.metric"], refuse)
    assert asked == ["metric"]
    with pytest.raises(JobError) as refused:
        check.require()
    said = str(refused.value)
    assert len(refused.value.problems) == 3
    assert "evaluate.metric: no such metric" in said and "scale.workers" in said
    assert "not checked, for it depends on a wrong value: batch sizes (scale.workers), the schedule (train." in said
    again = from_record(to_record(refused.value))
    assert str(again) == said and isinstance(again, JobError)


def test_data_that_is_refused_keeps_its_exit_code_where_nothing_else_is_wrong() -> None:
    def refuse() -> None:
        raise DataError("a.parquet: is no parquet")

    alone = Checks(draft(changed()))
    alone("files", ["data.train"], refuse)
    with pytest.raises(DataError, match="no parquet"):
        alone.require()
    beside = Checks(draft(changed(scale={"workers": 0})))
    beside("files", ["data.train"], refuse)
    with pytest.raises(JobError, match=r"scale\.workers(.|\n)*no parquet"):
        beside.require()
