"""What went wrong in another process is raised here as what it was: type, exit code and message."""

import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.evaluation import task as evaluation
from orchestrator.sharding import ray_tasks
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import (
    DataError,
    EvaluationError,
    JobError,
    PlacementError,
    Preempted,
    TrainingError,
    TuneyardError,
    from_record,
    to_record,
)
from trainers.evaluation.evaluate import Measured
from trainers.run.events import RefusedEvent, parse_events
from trainers.run.folder import read_evaluations
from trainers.run.record import find_run
from trainers.tokenizer.gigatoken import TokenizerDiffers
from trainers.worker import rank_server

ERRORS = [
    JobError("one problem"),
    JobError(["a: wrong", "b: wrong too"], "job.yaml"),
    PlacementError("no room"),
    DataError("7 rows"),
    TrainingError("it diverged"),
    EvaluationError("no metric"),
    Preempted("stopped"),
    TokenizerDiffers("row 3"),
]


def same(error: BaseException, raised: BaseException) -> bool:
    assert isinstance(error, TuneyardError) and isinstance(raised, TuneyardError)
    return (type(error), str(error), error.exit_code) == (type(raised), str(raised), raised.exit_code)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_record_in_json_gives_the_error_back(error: TuneyardError) -> None:
    back = from_record(json.loads(json.dumps(to_record(error))))
    assert same(error, back) and back.exit_code == error.exit_code


def test_of_an_error_of_others_the_type_stays_in_the_message() -> None:
    back = from_record(to_record(KeyError("x")))
    assert (type(back), str(back), back.exit_code) == (TuneyardError, "KeyError: 'x'", 1)


@pytest.mark.parametrize("error", ERRORS[1:4], ids=lambda error: type(error).__name__)
def test_what_a_rank_refuses_the_controller_raises(monkeypatch: pytest.MonkeyPatch, error: TuneyardError) -> None:
    def refuse(*_: Any) -> None:
        raise error

    events = io.StringIO()
    hooks = rank_server.PipeHooks(events, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(rank_server, "run_rank", refuse)
    assert rank_server._run(SimpleNamespace(), hooks) == error.exit_code  # type: ignore[arg-type]
    (refused,) = parse_events(events.getvalue().encode().splitlines())
    assert isinstance(refused, RefusedEvent) and same(error, from_record(refused.error))


@pytest.mark.parametrize("error", [ERRORS[1], ERRORS[3], ERRORS[7]], ids=lambda error: type(error).__name__)
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_what_a_ray_task_refuses_the_driver_raises(error: TuneyardError) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as raised:
        list(ray_tasks.map_tasks(refuse, None, [1]))
    assert same(error, raised.value)


def test_an_evaluation_that_fails_says_of_which_type_and_exit_code(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    run = find_run(job)
    record = evaluation.evaluate_step(run, 7)
    (kept,) = read_evaluations(run.folder, run.shards.eval.key)
    assert kept == record and kept.status == "failed" and kept.cause
    back = from_record(kept.cause)
    assert isinstance(back, EvaluationError) and back.exit_code == 6
    assert kept.error == f"EvaluationError: {back}"


def behind(error: Exception) -> Exception:
    """A refusal that a storage in trouble has caused."""
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), behind(JobError("no tokenizer")), MemoryError()], ids=repr
)
@pytest.mark.parametrize(("times", "status"), [(2, "done"), (3, "failed")])
def test_a_storage_in_trouble_is_no_verdict_on_a_checkpoint(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, times: int, status: str, error: Exception
) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)
    tries: list[int] = []

    def measure(*_: Any) -> Any:
        tries.append(1)
        if len(tries) <= times:
            raise error
        return Measured({"f1_macro": 1.0}, {}, {}, {}, 4)

    monkeypatch.setattr(evaluation, "_measure", measure)
    monkeypatch.setattr(evaluation, "RETRY_PAUSE_S", 0.0)
    assert evaluation.evaluate_step(find_run(job), 7).status == status
    assert len(tries) == 3


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_an_evaluation_task_that_takes_no_gpu_sees_none(tmp_path: Path, tiny_tokenizer: Path) -> None:
    import ray

    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(20))
    shard_locally(job)

    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get(evaluation._with_resources(find_run(job), 0, seen).remote()) == ""
