"""`tuneyard verify` as a user calls it."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.forked import run_command
from tests.ray_head import free_ports
from tests.tiny import shard_locally, tiny_job
from tests.trainers.tasks import small
from trainers.errors import TrainingError
from trainers.job.load import load_job
from trainers.tasks.causal import CausalTask

BY_MASK = ("--set", "model.attention=sdpa")
"""Attention that a wrong mask can lead astray; by bounds no mask is read."""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    job = tiny_job(tmp_path, small.llama(tmp_path / "llama"), "pretrain", small.plain_rows(30))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return path


def test_verify_prints_its_findings_and_keeps_them(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CliRunner().invoke(app, ["verify", str(job_file), *BY_MASK, "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert {check["name"] for check in found["checks"]} >= {"isolation", "cut_of_step", "reload", "bf16"}
    assert all(check["passed"] for check in found["checks"])
    monkeypatch.setattr(CausalTask, "forward_options", {"use_cache": True})  # leaks between packed documents
    assert CliRunner().invoke(app, ["verify", str(job_file), *BY_MASK]).exit_code == 0  # kept
    again = CliRunner().invoke(app, ["verify", str(job_file), *BY_MASK, "--again"])
    assert isinstance(again.exception, TrainingError)
    assert "isolation" in str(again.exception)
    assert again.exception.exit_code == 5


@pytest.mark.slow
def test_a_first_launch_runs_the_tests_and_refuses_what_fails(job_file: Path) -> None:
    job = load_job(str(job_file), [])
    shard_locally(job)

    def launch(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        (port,) = free_ports(1)
        contract = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        sets = [word for value in (f"name={name}", *words) for word in ("--set", value)]
        folder = job_file.parent
        return run_command([str(job_file), *sets], folder, "trainers.__main__", **contract, MASTER_PORT=str(port))

    first = launch("first")
    assert first.returncode == 0, first.stderr
    assert "self-tests: all 9 passed" in first.stdout
    (record,) = (path for path in (Path(job.storage) / "verify").glob("*.json") if "packing" not in path.name)
    found = json.loads(record.read_text())
    found["checks"][0] |= {"passed": False, "detail": "a document moved another"}
    record.write_text(json.dumps(found))
    second = launch("second")
    assert second.returncode == 5
    assert "isolation: a document moved another" in second.stderr and "train.verify: false" in second.stderr
    third = launch("third", "train.verify=false")
    assert third.returncode == 0 and "self-tests" not in third.stdout
