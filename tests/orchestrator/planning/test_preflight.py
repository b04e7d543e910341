"""What is known before launch is refused before launch, all of it at once."""

import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.planning.preflight import check_job
from orchestrator.run_session import finished_run
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.__main__ import _main as trainers_main
from trainers.errors import DataError, JobError
from trainers.job.load import parse_job
from trainers.run.folder import RegisteredVersion, RunResult
from trainers.run.lock import own_folder
from trainers.run.record import find_run


def test_what_the_model_cannot_take_is_told_with_the_rest(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", film_rows(20), evaluate={"metric": "nonsense"})
    job = job.model_copy(update={"data": job.data.model_copy(update={"max_length": 80})})
    with pytest.raises(JobError) as refused:
        check_job(job)
    assert len(refused.value.problems) == 2
    assert "nonsense" in refused.value.problems[0] and "64 positions" in refused.value.problems[1]


def test_nothing_is_converted_for_a_job_whose_data_is_not_there(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """Weights of a GGUF file take minutes; this one is none, which only who opens it knows."""
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    (model / "weights.gguf").write_bytes(b"none")
    job = tiny_job(tmp_path, model, "classify", film_rows(20))
    job = job.model_copy(update={"model": job.model.model_copy(update={"gguf_file": "weights.gguf"})})
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(JobError) as refused:
        check_job(job)
    assert len(refused.value.problems) == 1 and "train.jsonl" in refused.value.problems[0]


def test_under_torchrun_and_before_sharding_it_is_told_too(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    command = [str(file), "--set", "data.max_length=80"]
    monkeypatch.setattr(sys, "argv", ["trainers", *command])
    assert trainers_main() == 2
    assert "than the 64 positions" in capsys.readouterr().err
    refused = CliRunner().invoke(app, ["shard", *command])
    assert isinstance(refused.exception, JobError) and "than the 64 positions" in str(refused.exception)


def test_torchrun_refuses_early_stopping_that_nobody_feeds_and_a_run_that_another_is_at_work_on(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    idle = ["--set", "evaluate.on=free", "--set", "evaluate.early_stopping={patience: 1}"]
    monkeypatch.setattr(sys, "argv", ["trainers", str(file), *idle])
    assert trainers_main() == 2
    assert "evaluate.early_stopping: under this launcher the ranks alone evaluate" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["trainers", str(file)])
    with own_folder(find_run(job).folder):
        assert trainers_main() == 2
    assert "another process is at work" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b:c", "", " ", ".."])
def test_a_name_that_registries_refuse_is_refused_with_the_job(tmp_path: Path, name: str) -> None:
    job = tiny_job(tmp_path, tmp_path, "classify", film_rows(20))
    with pytest.raises(JobError, match=r"registry.model: must be a name without / and :, .* got"):
        parse_job({**job.model_dump(mode="json"), "registry": {"model": name}})


@pytest.mark.parametrize("name", ["it's", "a\nb", "x" * 257])
def test_a_name_that_a_registry_cannot_look_up_is_refused_with_the_job(tmp_path: Path, name: str) -> None:
    job = tiny_job(tmp_path, tmp_path, "classify", film_rows(20))
    with pytest.raises(JobError, match=r"registry.model: must be a name of at most 256 characters, without ' and line"):
        parse_job({**job.model_dump(mode="json"), "registry": {"model": name}})


def test_one_class_is_refused_once_the_rows_are_counted(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = [{**row, "label": "good"} for row in film_rows(20)]
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", rows)
    shard_locally(job)
    with pytest.raises(DataError, match="all 16 rows have the label 'good', so there is nothing to tell apart"):
        find_run(job)


def test_a_run_is_done_only_where_it_is_registered_under_the_jobs_name(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    version = RegisteredVersion(model=job.name, version=1, alias=None, step=2, source="x", decision="first")
    run = find_run(job)
    run.folder.write_bytes("result.json", RunResult(status="done", registry=version).model_dump_json().encode())
    checked = check_job(job)
    assert finished_run(checked) is not None
    other = job.model_copy(update={"registry": job.registry.model_copy(update={"model": "other"})})
    assert finished_run(check_job(other)) is None
