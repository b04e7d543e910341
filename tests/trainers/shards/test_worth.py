"""Rows that cannot teach are refused with the shards, and evaluation rows that cannot give the metric before a run."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.plan import plan_job
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import DataError
from trainers.shards.drop_budget import check_shards
from trainers.shards.worth import check_metric

PAIR = {"sentence1": "the film", "sentence2": "the plot"}
TAGGED = {"tokens": ["the", "film"], "tags": ["O", "O"]}


@pytest.mark.parametrize(
    ("task", "rows", "more", "said"),
    [
        ("tag", [TAGGED] * 3, {}, "all 3 rows have the tag 'O' alone"),
        (
            "classify",
            [{"text": "a", "label": ["x", "y"]}] * 3,
            {"multi_label": True},
            "have the label 'x' and 'y' alone",
        ),
        ("similarity", [{**PAIR, "score": 0.5}] * 3, {}, "all 3 rows have the score 0.5"),
    ],
)
def test_rows_that_are_all_alike_are_refused(
    task: str, rows: list[Any], more: Any, said: str, make_job: Any, write_rows: Any, shard_here: Any
) -> None:
    path = write_rows("x.jsonl", rows)
    job = make_job(task, train=[path], eval=[path], **more)
    with pytest.raises(DataError, match=said):
        check_shards(job, shard_here(job))


@pytest.mark.parametrize(
    ("task", "rows", "more"),
    [
        ("tag", [TAGGED, {**TAGGED, "tags": ["O", "B-x"]}], {}),
        ("classify", [{"text": "a", "label": ["x"]}, {"text": "b", "label": []}], {"multi_label": True}),
        ("similarity", [{**PAIR, "score": 0.5}, {**PAIR, "score": 1}], {}),
    ],
)
def test_rows_that_differ_are_not(
    task: str, rows: list[Any], more: Any, make_job: Any, write_rows: Any, shard_here: Any
) -> None:
    path = write_rows("x.jsonl", rows)
    job = make_job(task, train=[path], eval=[path], **more)
    check_shards(job, shard_here(job))
    check_metric(job, shard_here(job))


def test_a_metric_that_the_evaluation_rows_cannot_give_is_refused_before_the_run(
    tmp_path: Path, make_job: Any, write_rows: Any, shard_here: Any
) -> None:
    train = write_rows("x.jsonl", [{**PAIR, "score": score} for score in (0.5, 1)])
    job = make_job("similarity", train=[train], eval=[write_rows("y.jsonl", [{**PAIR, "score": 1}])])
    shards = shard_here(job)
    check_shards(job, shards)
    with pytest.raises(
        DataError, match=r"spearman is not defined: data.eval: all 1 rows have the score 1.* such as loss"
    ):
        check_metric(job, shards)
    check_metric(job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"metric": "mse"})}), shards)


def test_auroc_needs_every_label_in_the_evaluation_rows(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = [{**row, "label": "positive" if index < 4 else row["label"]} for index, row in enumerate(film_rows(20))]
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", rows, evaluate={"metric": "auroc"})
    shards = shard_locally(job)
    with pytest.raises(DataError, match=r"auroc is not defined: no evaluation row has \['negative'\]"):
        check_metric(job, shards)
    assert any("auroc is not defined" in note for note in plan_job(checked(job)).notes)
    counted = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"metric": "accuracy"})})
    check_metric(counted, shards)
