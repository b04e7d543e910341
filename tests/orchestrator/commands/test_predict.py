"""`tuneyard predict` with a model folder, a run and a registered model; any format in, jsonl or parquet out."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.evaluation import predictions
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.register import register
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job, write_rows
from trainers.errors import JobError
from trainers.evaluation.predict import check_asked
from trainers.run.folder import Evaluation
from trainers.run.record import Run, find_run
from trainers.sources.files import find_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Run:
    """A run with the export of step 3, registered as version 1; its checkpoints are gone."""
    folder = tmp_path_factory.mktemp("predict")
    job = tiny_job(folder, make_bert(folder / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    run = find_run(job)
    run.folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    export = run.folder / "export" / "step-00000003"
    run.load_task().load_model(job.model.path, pad_id=0, trust_remote_code=False).save_pretrained(export.path)
    for file in tiny_tokenizer.iterdir():
        shutil.copy(file, export.path / file.name)
    best = Evaluation(step=3, status="done", metrics={"accuracy": 0.5}, eval_key="e")
    register(job, run.folder, best, export, {}, Promotion(promote=True, reason="test"))
    return run


def call(*words: str) -> Any:
    done = CliRunner().invoke(app, ["predict", *words])
    if isinstance(done.exception, JobError):
        raise done.exception
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_a_csv_without_labels_becomes_jsonl_and_parquet_with_the_same_predictions(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "new.csv").open("w") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text"], ["the film is good"], [""], ["a plot"]])
    model, data = f"{run.folder}/export/step-00000003", str(tmp_path / "new.csv")
    assert "wrote 3 predictions" in call(model, data, "-o", str(tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["the film is good", None, "a plot"]
    assert [line.get("error") for line in lines] == [None, "missing_text", None]
    assert lines[0]["prediction"] in ("negative", "positive") and 0.5 <= lines[0]["probability"] <= 1
    call(model, data, "-o", str(tmp_path / "out.parquet"))
    columns = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["prediction"] for row in columns] == [line.get("prediction") for line in lines]
    assert [json.loads(line)["text"] for line in call(model, data).splitlines()] == [line["text"] for line in lines]
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "out.jsonl", "out.parquet"}


def test_a_registered_model_answers_by_its_name(run: Run) -> None:
    (dev,) = run.job.data.eval
    words = (dev, "--storage", run.job.storage)
    answers = [json.loads(line)["prediction"] for line in call("tiny@champion", *words).splitlines()]
    assert len(answers) == 4
    assert [json.loads(line)["prediction"] for line in call("tiny@1", *words).splitlines()] == answers


def test_what_cannot_be_used_is_named(run: Run, tmp_path: Path, tiny_tokenizer: Path) -> None:
    (dev,) = run.job.data.eval
    with pytest.raises(JobError, match=r"\.jsonl or \.parquet"):
        call(f"{run.folder}/export/step-00000003", dev, "-o", str(tmp_path / "out.xlsx"))
    with pytest.raises(JobError, match=r"neither a run .* nor a registered model"):
        call("nobody", dev, "--storage", run.job.storage)
    with pytest.raises(JobError, match="no committed checkpoint"):
        call(str(run.folder), dev)
    shutil.copytree(run.folder.path / "export" / "step-00000003", tmp_path / "elsewhere")
    with pytest.raises(JobError, match="does not lie in a run folder"):
        call(str(tmp_path / "elsewhere"), dev)
    with pytest.raises(JobError, match="no such file"):
        call(f"{run.folder}/export/step-00000003", str(tmp_path / "none.jsonl"))


def test_a_file_without_the_tasks_columns_is_refused(run: Run, tmp_path: Path) -> None:
    model = f"{run.folder}/export/step-00000003"
    data = str(write_rows(tmp_path / "rows.jsonl", [{"body": "the film is good"}]))
    with pytest.raises(JobError, match=r"no column 'text'; columns here: body"):
        call(model, data, "-o", str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
    said = call(model, data, "--set", "data.columns.text=body", "--set", "data.columns.label=verdict")
    assert "prediction" in json.loads(said)


@pytest.mark.parametrize(
    "task, row",
    [
        ("classify", {"text": "a"}),
        ("tag", {"tokens": ["a"]}),
        ("extract", {"question": "a", "context": "b"}),
        ("similarity", {"sentence1": "a", "sentence2": "b"}),
        ("seq2seq", {"source": "a"}),
        ("sft", {"messages": []}),
        ("sft", {"conversations": []}),
        ("sft", {"instruction": "a"}),
        ("sft", {"prompt": "a"}),
        ("pretrain", {"text": "a"}),
    ],
)
def test_no_task_needs_the_answers(tmp_path: Path, task: str, row: dict[str, Any]) -> None:
    job, data = tiny_job(tmp_path, tmp_path, task, [row]), str(write_rows(tmp_path / "new.jsonl", [row]))
    check_asked(job, find_sources([data], None, "DATA", digests=False, task=task), "DATA")
    other = str(write_rows(tmp_path / "other.jsonl", [{"x": 1}]))
    with pytest.raises(JobError, match="no column"):
        check_asked(job, find_sources([other], None, "DATA", digests=False, task=task), "DATA")


@pytest.mark.cluster
def test_several_workers_write_the_bytes_of_one_though_one_is_killed(
    run: Run, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"the film is {'very ' * (number % 7)}good {number}"} for number in range(2321)]
    data, model = str(write_rows(tmp_path / "rows.jsonl", rows)), f"{run.folder}/export/step-00000003"
    once = tmp_path / "once"

    class Dies(predictions.Worker):
        """The first of all dies with its second chunk."""

        def say(self, chunk: Any) -> Any:
            self.chunks = getattr(self, "chunks", 0) + 1
            if self.chunks == 2 and not once.exists():
                once.touch()
                os._exit(9)
            return super().say(chunk)

    assert "wrote 2,321" in call(model, data, "-o", str(tmp_path / "one.jsonl"))
    monkeypatch.setattr(predictions, "Worker", Dies)
    assert "wrote 2,321" in call(model, data, "-o", str(tmp_path / "two.jsonl"), "--workers", "2")
    assert once.exists()
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
