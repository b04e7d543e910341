"""`tuneyard verify` as a user calls it."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.tiny import tiny_job
from tests.trainers.tasks import small
from trainers.errors import TrainingError
from trainers.tasks.causal import CausalTask


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    job = tiny_job(tmp_path, small.llama(tmp_path / "llama"), "pretrain", small.plain_rows(30))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return path


def test_verify_prints_its_findings_and_keeps_them(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CliRunner().invoke(app, ["verify", str(job_file), "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert {check["name"] for check in found["checks"]} >= {"isolation", "cut_of_step", "reload", "bf16"}
    assert all(check["passed"] for check in found["checks"])
    monkeypatch.setattr(CausalTask, "forward_options", {"use_cache": True})  # leaks between packed documents
    assert CliRunner().invoke(app, ["verify", str(job_file)]).exit_code == 0  # kept
    again = CliRunner().invoke(app, ["verify", str(job_file), "--again"])
    assert isinstance(again.exception, TrainingError)
    assert "isolation" in str(again.exception)
    assert again.exception.exit_code == 5
