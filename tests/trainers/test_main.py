"""A launch without a controller: rank 0 owns the log and the checkpoints, by the same rules as the controller."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.orchestrator.training.test_placement import job_of
from trainers.__main__ import LocalHooks
from trainers.checkpoint.reading import committed_steps
from trainers.job.load import load_job
from trainers.job.schema import EarlyStopping
from trainers.run.events import CheckpointEvent, EvaluationEvent, StartEvent, StepEvent
from trainers.run.folder import Evaluation, RegisteredVersion, RunResult, step_name, write_evaluation
from trainers.storage import Folder


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHooks]:
    folder, job = Folder(str(tmp_path)), job_of(1)
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"keep": 1})})
    shards = SimpleNamespace(eval=SimpleNamespace(key="e"))
    run: Any = SimpleNamespace(folder=folder, checkpoints=folder / "checkpoints", job=job, shards=shards)
    before = signal.getsignal(signal.SIGTERM)
    yield LocalHooks(run)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, before)


def commit(folder: Folder, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / step_name(step)).write_bytes("COMMITTED", b"x")


def test_the_best_and_the_registered_checkpoint_stay_where_torchrun_goes_on(tmp_path: Path, hooks: LocalHooks) -> None:
    folder = Folder(str(tmp_path))
    commit(folder, 1, 2, 3, 4)
    for step, value in ((1, 0.1), (2, 0.9), (4, float("nan"))):
        record = Evaluation(step=step, status="done", metrics={"accuracy": value}, eval_key="e")
        (folder / "evals").write_bytes(f"{step_name(step)}.json", record.model_dump_json().encode())
    version = RegisteredVersion(model="m", version=1, alias="champion", step=3, source="s", decision="d")
    result = RunResult(status="done", registry=version)
    folder.write_bytes("result.json", result.model_dump_json().encode())
    commit(folder, 5)
    hooks.emit(StartEvent(step=4, steps=9))
    hooks.emit(CheckpointEvent(step=5))
    assert committed_steps(folder / "checkpoints") == [2, 3, 5]


def test_evaluations_of_the_ranks_decide_what_stays_and_when_to_stop(tmp_path: Path, hooks: LocalHooks) -> None:
    folder, job = Folder(str(tmp_path)), hooks._run.job
    evaluate = job.evaluate.model_copy(update={"early_stopping": EarlyStopping(patience=2)})
    hooks._run.job = job.model_copy(update={"evaluate": evaluate})
    hooks.emit(StartEvent(step=0, steps=9))
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.8), (4, 0.7)):
        commit(folder, step)
        hooks.emit(CheckpointEvent(step=step))
        assert hooks.stop_reason() is None
        record = Evaluation(step=step, status="done", metrics={"accuracy": value}, eval_key="e")
        write_evaluation(folder, record)
        hooks.emit(EvaluationEvent(step=step, metrics=record.metrics, held_s=1.0))
    assert committed_steps(folder / "checkpoints") == [2, 4]
    assert hooks.stop_reason() == "early_stopping"


def test_the_run_has_its_job_and_steps_are_printed_now_and_then(
    tmp_path: Path, hooks: LocalHooks, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks.emit(StartEvent(step=0, steps=900))
    for step in range(1, 101):
        hooks.emit(StepEvent(step=step, loss=1.0, time=1000.0 + step))
    assert load_job(tmp_path / "job.yaml", ()).name == "x"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training on 1 worker, to step 900"
    assert [line.partition(":")[0] for line in lines[1:]] == [f"step {step}" for step in range(1, 101, 10)]
