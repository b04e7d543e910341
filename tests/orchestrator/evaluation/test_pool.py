"""Evaluators that are killed: their step is evaluated again and counted once, or recorded as failed, never chosen."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.evaluation import pool as pools
from orchestrator.evaluation import task
from orchestrator.evaluation.pool import EvaluationPool
from tests.tiny import make_llama, shard_locally, tiny_job
from trainers.errors import TrainingError
from trainers.evaluation.selection import find_best
from trainers.run.events import CheckpointEvent, EvaluationEvent, StartEvent
from trainers.run.folder import Evaluation, read_evaluations, write_evaluation
from trainers.run.record import find_run
from trainers.storage import Folder

pytestmark = pytest.mark.cluster


def test_a_killed_evaluator_is_tried_again_and_its_step_counts_once(
    tmp_path: Path, tiny_chat_tokenizer: Path, ray_session: None
) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "pretrain", [{"text": f"the film is good {i}"} for i in range(20)])
    shard_locally(job)
    run, once = find_run(job), tmp_path / "once"

    def dies_once(*arguments: Any) -> Evaluation:
        if not once.exists():
            once.touch()
            os._exit(9)
        return task.evaluate_step(*arguments)

    def dies(*_: Any) -> Evaluation:
        os._exit(9)

    pool = EvaluationPool(run, 0)
    pool._task = task._with_resources(run, 0, dies_once)
    (record,) = pool.finish()
    assert once.exists() and record.status == "done" and record.rows == 4
    assert pool.records == read_evaluations(run.folder) == [record] and not pool.waiting()
    lost = run.model_copy(update={"folder": Folder(f"{tmp_path}/lost")})
    pool = EvaluationPool(lost, 0)
    pool._task = task._with_resources(lost, 0, dies)
    (record,) = pool.finish()
    assert record.status == "failed" and "Crashed" in str(record.error)
    assert read_evaluations(lost.folder) == [record] and find_best([record], "loss", "min") is None


def test_storage_that_fails_for_a_moment_deletes_nothing_and_ends_nothing(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "pretrain", [{"text": f"the film is good {i}"} for i in range(20)])
    shard_locally(job)
    run = find_run(job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"keep": 1})}))
    pool = EvaluationPool(run, 0)
    for name in ("promoted_steps", "read_evaluations"):
        monkeypatch.setattr(f"orchestrator.evaluation.pool.{name}", stale)
    for step in (1, 2):
        pool.note(CheckpointEvent(step=step, bytes=1))
    pool.note(EvaluationEvent(step=1, held_s=1.0))
    pool.prune()
    assert {1, 2} <= set(pool.waiting()) and pool.kept.steps == {1, 2}


def test_ranks_that_start_over_leave_old_evaluations_behind_but_not_the_files_of_a_version(
    tmp_path: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "pretrain", [{"text": f"the film is good {i}"} for i in range(20)])
    shard_locally(job)
    run, begins = find_run(job), StartEvent(step=0, steps=6)
    write_evaluation(run.folder, Evaluation(step=3, status="done", eval_key=run.shards.eval.key))
    export = run.folder / "export/step-00000003"
    export.write_bytes("model.safetensors", b"weights")
    pool = EvaluationPool(run, 0)
    monkeypatch.setattr(pools, "is_registered", lambda _, folder: str(folder) == str(export))
    with pytest.raises(TrainingError, match="is a version in the registry"):
        pool.note(begins)
    assert export.exists("model.safetensors")
    monkeypatch.undo()
    pool.note(begins)  # the registry holds nothing
    assert pool.records == [] and read_evaluations(run.folder) == [] and not export.exists("model.safetensors")
