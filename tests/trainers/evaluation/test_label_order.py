"""A folder with a head of its own keeps the order of its labels, in evaluation and in training."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.plan import plan_job
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import JobError
from trainers.evaluation.evaluate import evaluate_model
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder


def with_head(base: Path, folder: Path, labels: list[str], weights: Any, kind: str = "Sequence") -> Path:
    """The base model with a classification head whose rows are `weights`."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    auto: Any = getattr(transformers, f"AutoModelFor{kind}Classification")
    model = auto.from_pretrained(
        base, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
    )
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(weights))
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return make_bert(tmp_path_factory.mktemp("base"), tiny_tokenizer, dropout=0.0)


def test_the_same_classifier_has_the_same_metrics_in_either_order(base: Path, tmp_path: Path) -> None:
    import torch

    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).tolist()
    same = with_head(base, tmp_path / "same", ["negative", "positive"], rows)
    flip = with_head(base, tmp_path / "flip", ["positive", "negative"], rows[::-1])
    job = tiny_job(tmp_path, base, "classify", film_rows(40))
    shards = shard_locally(job)
    accuracies, labels = [], []
    for model in (same, flip):
        task = job_task(job, shards.train, str(model))
        held = ShardSet(shards_folder(Folder(job.storage), shards.eval.key), shards.eval, task)
        _, scores = evaluate_model(job, task, str(model), held)
        accuracies.append(task.metrics(scores)["accuracy"])
        labels.append(task.labels)
    assert labels == [("negative", "positive"), ("positive", "negative")]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (["positive", "negative"], ("positive", "negative")),
        (["positive", "neutral", "negative"], ("positive", "neutral", "negative")),
        (["LABEL_0", "LABEL_1"], ("negative", "positive")),
    ],
)
def test_training_starts_with_the_labels_of_the_head(
    own: list[str], labels: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    model = with_head(base, tmp_path / "model", own, [[0.0] * 32] * len(own))
    job = tiny_job(tmp_path, model, "classify", film_rows(20))
    task = job_task(job, shard_locally(job).train, str(model))
    assert task.labels == labels and task.config_changes()["num_labels"] == len(own)


@pytest.mark.parametrize("names", [["bad", "fair", "good"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_integers_are_the_indices_of_the_heads_labels(names: list[str], base: Path, tmp_path: Path) -> None:
    model = with_head(base, tmp_path / "model", names, [[0.0] * 32] * 3)
    job = tiny_job(tmp_path, model, "classify", [{"text": "a film", "label": 2 * (i % 2)} for i in range(20)])
    assert job_task(job, shard_locally(job).train, str(model)).labels == ("0", "1", "2")


def test_a_head_with_other_labels_is_refused(base: Path, tmp_path: Path) -> None:
    model = with_head(base, tmp_path / "model", ["bad", "good"], [[0.0] * 32] * 2)
    job = tiny_job(tmp_path, model, "classify", film_rows(20))
    message = r"knows the labels \['bad', 'good'\], not \['negative', 'positive'\]"
    with pytest.raises(JobError, match=message):
        plan_job(checked(job))
    with pytest.raises(JobError, match=message):
        job_task(job, shard_locally(job).train, str(model))


def test_tags_of_another_scheme_are_read_in_that_of_the_head(base: Path, tmp_path: Path) -> None:
    own = ["O", "S-per", "B-per", "I-per", "E-per"]
    model = with_head(base, tmp_path / "model", own, [[0.0] * 32] * 5, "Token")
    rows = [{"tokens": ["the", "film", "is"], "tags": ["B-per", "I-per", "O"]} for _ in range(20)]
    job = tiny_job(tmp_path, model, "tag", rows)
    task: Any = job_task(job, shard_locally(job).train, str(model))
    assert task.labels == tuple(own)
    assert json.loads((model / "config.json").read_text())["id2label"]["0"] == "O"


@pytest.mark.parametrize(
    ("kind", "task", "rows", "shown"),
    [
        ("Sequence", "classify", film_rows(20), r"2 labels, \['negative', 'positive'\]"),
        ("Token", "tag", [{"tokens": ["the", "film"], "tags": ["O", "B-per"]}] * 20, r"\d labels, \[.*'O'"),
    ],
)
def test_a_head_without_names_has_to_have_as_many_outputs_as_there_are_labels(
    kind: str, task: str, rows: list[dict[str, Any]], shown: str, base: Path, tmp_path: Path
) -> None:
    model = with_head(base, tmp_path / "model", [f"LABEL_{index}" for index in range(5)], [[0.0] * 32] * 5, kind)
    job = tiny_job(tmp_path, model, task, rows)
    message = f"has 5 outputs without names, and the data shows {shown}"
    with pytest.raises(JobError, match=message):
        plan_job(checked(job))
    with pytest.raises(JobError, match=message):
        job_task(job, shard_locally(job).train, str(model))
