"""A metric that the job brings: what it is given in each task, and what is said where it fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.planning.preflight import check_job
from orchestrator.registry.promotion import RowScores, baselines_of, decide
from tests.tiny import make_bert, tiny_job
from tests.trainers.evaluation.test_predict import rows_of
from tests.trainers.tasks.small import small_jobs, with_head
from trainers.errors import EvaluationError, JobError
from trainers.evaluation.evaluate import check_repeatable, evaluate_model
from trainers.job.load import parse_job
from trainers.run.record import find_run
from trainers.storage import Folder
from trainers.tasks import Task, choose_metric, load_task
from trainers.tasks.metrics.own import load_metric
from trainers.tasks.options import TaskOptions

NAMES = ("classify causal", "several", "tag", "extract", "extract v2", "regression", "T5", "sft", "pretrain")
CODE = """
import json

def told(labels, predictions, texts):
    with open(__file__ + ".json", "w") as stream:
        json.dump([labels, predictions, texts], stream)
    return sum(map(len, texts))

def drawn(labels, predictions, texts, seen=[]):
    seen.append(1)
    return len(seen)

def fails(labels, predictions, texts):
    return labels[0]["x"]

def words(labels, predictions, texts):
    return "many"

def right(labels, predictions, texts):
    return sum(map(str.__eq__, labels, predictions)) / len(labels)

number = 3
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_jobs(tmp_path_factory.mktemp("own"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path / "own.py"


def options(own: Path, name: str, **more: Any) -> TaskOptions:
    return TaskOptions.model_validate({"metrics": {name: {"function": f"{own}:{name}"}}, **more})


def task_with(own: Path, name: str) -> Task:
    task = load_task("classify", options(own, name))
    task.labels = ("a", "b")
    return task


NUMBERS = {"label": np.array([0, 1, 1]), "prediction": np.array([0, 1, 0]), "loss_sum": np.ones(3),
           "text": np.array(["x", "y", "z"], dtype=object)}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_gets_labels_predictions_and_texts_row_by_row(
    jobs: dict[str, Any], own: Path, tmp_path: Path, name: str
) -> None:
    run = find_run(jobs[name])
    model, task = str(with_head(run, tmp_path / "model")), run.load_task()
    task.options = task.options.model_copy(update={"metrics": options(own, "told").metrics})
    _, numbers = evaluate_model(run.job, task, model, run.open_shards("eval", task))
    assert task.measure(numbers)["told"] == sum(map(len, numbers["text"]))
    labels, predictions, texts = json.loads(own.with_name("own.py.json").read_text())
    rows = rows_of(run)
    assert len(labels) == len(predictions) == len(texts) == len(rows)
    if name in ("classify causal", "several"):
        truth = [row["label"] for row in rows]
        assert [set(one) if name == "several" else one for one in labels] == (
            [set(one) for one in truth] if name == "several" else truth
        )
        assert {one for said in predictions for one in (said if name == "several" else [said])} <= set(task.labels)
    elif name == "tag":
        assert labels == [row["tags"] for row in rows] and list(map(len, predictions)) == list(map(len, labels))
    elif "extract" in name:
        assert labels == [[answer["text"] for answer in row["answers"]] for row in rows]
        assert all(said in row["context"] for said, row in zip(predictions, rows, strict=True))
    elif name == "regression":
        assert labels == pytest.approx([row["score"] for row in rows]) and predictions == numbers["said"].tolist()
    elif name in ("T5", "sft"):
        last = [row["target"] if name == "T5" else row["messages"][-1]["content"] for row in rows]
        assert [one.split() for one in labels] == [one.split() for one in last]
        assert predictions == numbers["said"].tolist()
    else:
        assert set(labels) == set(predictions) == {None}


@pytest.mark.parametrize(
    "name, says",
    [("fails", "own.py:fails raised TypeError"), ("words", "own.py:words gave 'many', which is no number")],
)
def test_a_metric_that_fails_is_named(own: Path, name: str, says: str) -> None:
    with pytest.raises(EvaluationError, match=f"evaluate.metrics.{name}: .*{says}"):
        task_with(own, name).measure(NUMBERS)


def test_a_metric_that_says_two_things_of_the_same_rows_is_refused(own: Path) -> None:
    task = task_with(own, "drawn")
    with pytest.raises(EvaluationError, match=r"gave 1.0 and then 2.0 for the same rows; what it draws must be seeded"):
        check_repeatable(task, NUMBERS, task.measure(NUMBERS))


@pytest.mark.parametrize("where", ["own.py:none", "none.py:right", "no_such_module:right", "own.py:number", "right"])
def test_a_metric_that_is_not_there_is_refused_before_anything_starts(own: Path, tmp_path: Path, where: str) -> None:
    with pytest.raises(JobError, match=r"evaluate.metrics.right: .*(cannot be loaded|not a function)"):
        load_metric("right", str(tmp_path / where) if ".py" in where else where)


def test_what_a_job_names_wrongly_is_told_at_once(tmp_path: Path, own: Path, tiny_tokenizer: Path) -> None:
    own_metrics = {"right": {"function": f"{own}:gone"}, "accuracy": {"function": f"{own}:right"}}
    evaluate = {"metrics": own_metrics, "guards": {"f2": 1.0, "loss@far": 1.0}}
    rows = [{"text": "the film", "label": label} for label in "ab" * 10]
    job = tiny_job(tmp_path, make_bert(tmp_path / "m", tiny_tokenizer), "classify", rows, evaluate=evaluate)
    with pytest.raises(JobError) as caught:
        check_job(job)
    taken = "evaluate.metrics.accuracy: task classify has a metric of that name"
    unknown = "evaluate.guards.loss@far: data.eval_sets has no 'far'"
    for said in (taken, "own.py:gone cannot be loaded", "not 'f2'", unknown):
        assert said in str(caught.value)


def test_its_path_is_taken_from_the_jobs_folder_and_it_may_decide(tmp_path: Path) -> None:
    raw = {"name": "x", "task": "classify", "model": {"path": "m/x"}, "data": {"train": "t.txt", "eval": "e.txt"},
           "train": {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4}}  # fmt: skip
    metrics = {"right": {"function": "own.py:right", "better": "min"}, "other": {"function": "package.module:name"}}
    job = parse_job(raw | {"evaluate": {"metrics": metrics, "metric": "right"}}, base=tmp_path)
    assert job.evaluate.metrics["right"].function == f"{tmp_path}/own.py:right"
    assert job.evaluate.metrics["other"].function == "package.module:name"
    assert choose_metric(job) == ("right", "min")


def test_it_decides_on_promotion_too(own: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 200)
    for share, promoted in ((0.9, True), (0.0, False)):
        said = np.where(random.random(200) < share, label, random.integers(0, 2, 200))
        texts = {"text": np.array(["x"] * 200, dtype=object), "row": np.arange(200)}
        candidate = RowScores("step 1", "k", {"label": label, "prediction": said, "loss_sum": np.ones(200), **texts})
        task = task_with(own, "right")
        baselines = baselines_of(Folder(str(tmp_path)), candidate, task, 0)
        assert decide("if_better", candidate, None, task, "right", "max", 0, baselines, 100).promote is promoted
