"""Rows that cannot teach are refused with the shards, and evaluation rows that cannot give the metric before a run."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.plan import plan_job
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.tasks import small
from trainers.errors import DataError, JobError
from trainers.shards.drop_budget import check_shards
from trainers.shards.worth import check_metric
from trainers.tasks import check_measures

PAIR = {"sentence1": "the film", "sentence2": "the plot"}
WITHOUT_GENERATE = "there is no rougeL in this job: it compares generated texts; set evaluate.generate"
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
    check_metric(job, shard_here(job), job.model.path)


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
        check_metric(job, shards, job.model.path)
    check_metric(_measured_by(job, metric="mse"), shards, job.model.path)


def test_auroc_needs_every_label_in_the_evaluation_rows(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = [{**row, "label": "positive" if index < 4 else row["label"]} for index, row in enumerate(film_rows(20))]
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", rows, evaluate={"metric": "auroc"})
    shards = shard_locally(job)
    with pytest.raises(DataError, match=r"auroc is not defined: no evaluation row has \['negative'\]"):
        check_metric(job, shards, job.model.path)
    assert any("auroc is not defined" in note for note in plan_job(checked(job)).notes)
    counted = _measured_by(job, metric="accuracy")
    check_metric(counted, shards, job.model.path)


def test_auroc_needs_rows_of_the_labels_that_only_the_models_head_knows(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from transformers import BertForSequenceClassification

    base = make_bert(tmp_path / "base", tiny_tokenizer)
    names = dict(enumerate(["negative", "neutral", "positive"]))
    head = BertForSequenceClassification.from_pretrained(base, num_labels=3, id2label=names)
    head.save_pretrained(base)
    job = tiny_job(tmp_path, base, "classify", film_rows(20), evaluate={"guards": {"auroc": 0.5}})
    said = r"evaluate.guards.auroc: auroc is not defined: no evaluation row has \['neutral'\], which the head of"
    with pytest.raises(DataError, match=said):
        check_metric(job, shard_locally(job), job.model.path)


@pytest.mark.parametrize("several", [False, True])
def test_auroc_of_one_label_a_row_is_for_fifty_classes(tmp_path: Path, tiny_tokenizer: Path, several: bool) -> None:
    rows = [{"text": "the film", "label": [f"c{i % 60}"] if several else f"c{i % 60}"} for i in range(600)]
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    sections = {"evaluate": {"metric": "auroc"}, "data": {"multi_label": several}}
    job = tiny_job(tmp_path, model, "classify", rows, **sections)
    shards = shard_locally(job)
    if several:
        check_metric(job, shards, job.model.path)
        return
    with pytest.raises(DataError, match="auroc is not defined: it is computed for up to 50 classes, and here are 60"):
        check_metric(job, shards, job.model.path)


@pytest.mark.parametrize("metric", ["best_f1", "best_exact"])
def test_the_best_threshold_needs_a_question_without_an_answer(metric: str, tmp_path: Path) -> None:
    model = small.bert(tmp_path / "bert")
    job = tiny_job(tmp_path, model, "extract", small.question_rows(20), evaluate={"metric": metric})
    with pytest.raises(
        DataError, match=f"evaluate.metric: {metric} is not defined: every question of data.eval has an"
    ):
        check_metric(job, shard_locally(job), job.model.path)
    some = tiny_job(tmp_path / "some", model, "extract", small.question_rows(20, True), evaluate={"metric": metric})
    check_metric(some, shard_locally(some), job.model.path)


def test_a_guard_of_a_set_beside_needs_the_rows_of_that_set(make_job: Any, write_rows: Any, shard_here: Any) -> None:
    rows = write_rows("x.jsonl", [{**PAIR, "score": score} for score in (0.5, 1)])
    far = {"far": [str(write_rows("y.jsonl", [{**PAIR, "score": 1}]))]}
    job = _measured_by(make_job("similarity", train=[rows], eval=[rows], eval_sets=far), guards={"pearson@far": 0.5})
    with pytest.raises(
        DataError, match=r"evaluate.guards.pearson@far: pearson is not defined: data.eval_sets.far: all 1"
    ):
        check_metric(job, shard_here(job), job.model.path)


@pytest.mark.parametrize(
    ("task", "rows", "sections", "metric", "said"),
    [
        ("sft", small.verdict_rows(10), {}, "rougeL", WITHOUT_GENERATE),
        ("classify", small.several_rows(10), {"data": {"multi_label": True}}, "mcc", "it is for rows of one label"),
        ("similarity", small.graded_rows(10), {"train": {"objective": "cosine"}}, "mse", "gives cosines, not scores"),
        ("similarity", small.graded_rows(10), {"train": {"objective": "contrastive"}}, "mse", "gives cosines"),
    ],
)
def test_a_metric_that_the_jobs_other_choices_leave_out_is_refused_at_once(
    task: str, rows: list[Any], sections: Any, metric: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=f"evaluate.metric: .*{said}"):
        check_measures(tiny_job(tmp_path, tmp_path, task, rows, **sections, evaluate={"metric": metric}))
    guarded = tiny_job(tmp_path, tmp_path, task, rows, **sections, evaluate={"guards": {metric: 0.5}})
    with pytest.raises(JobError, match=f"evaluate.guards.{metric}: .*{said}"):
        check_measures(guarded)


def test_rouge_of_generated_answers_is_not_refused(tmp_path: Path) -> None:
    wanted = {"metric": "rougeL", "generate": {"max_new_tokens": 8}}
    check_measures(tiny_job(tmp_path, tmp_path, "sft", small.verdict_rows(10), evaluate=wanted))


def _measured_by(job: Any, **changes: Any) -> Any:
    return job.model_copy(update={"evaluate": job.evaluate.model_copy(update=changes)})
