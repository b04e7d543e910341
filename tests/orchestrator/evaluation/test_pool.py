"""Evaluators that are killed: their step is evaluated again and counted once, or recorded as failed, never chosen."""

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.evaluation import task
from orchestrator.evaluation.pool import EvaluationPool
from tests.tiny import make_llama, shard_locally, tiny_job
from trainers.evaluation.selection import find_best
from trainers.run.folder import Evaluation, read_evaluations
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
