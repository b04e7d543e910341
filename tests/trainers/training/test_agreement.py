"""How often ranks talk to each other in a step beside the training itself: once, and twice where one waits for data."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import film_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import Recorder

pytestmark = pytest.mark.slow
STEPS = 4


def look(job: Any) -> dict[str, tuple[int, int]]:
    """Collectives that the loop itself began, and steps done: batches ready in time, late, and a stop asked for."""
    import sys

    import torch.distributed as dist

    import trainers.worker.rank
    from trainers.batching.batches import StepSource
    from trainers.run.record import find_run
    from trainers.storage import Folder

    begun = 0
    all_reduce, is_ready = dist.all_reduce, StepSource.is_ready

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal begun
        begun += sys._getframe(1).f_globals["__name__"] == "trainers.training.loop"
        return all_reduce(*given, **named)

    def in_time(source: StepSource, step: int) -> bool:
        return step < STEPS and source.ready(step, lambda: None) and is_ready(source, step)

    def run(name: str, ready: Any, stop_after: int | None = None) -> tuple[int, int]:
        nonlocal begun
        begun, StepSource.is_ready = 0, ready  # type: ignore[method-assign]
        hooks = Recorder(stop_after)
        one = find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / name})
        done = trainers.worker.rank.run_rank(one, hooks)
        return begun, done.progress.step

    dist.all_reduce = counted  # type: ignore[assignment]
    late = lambda source, step: False  # noqa: E731
    return {"in time": run("a", in_time), "late": run("b", late), "stopped": run("c", in_time, 2)}


def test_ranks_exchange_one_message_a_step_and_stop_together(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    rows = [{"text": row["text"]} for row in film_rows(60)]
    train = {"steps": STEPS, "deepspeed": "zero0", "verify": False}
    job = tiny_job(tmp_path, model, "pretrain", rows, train=train, checkpoint={"every_steps": 100})
    shard_locally(job)
    for found in run_ranks(look, 2, job):
        assert found["in time"] == (1 + STEPS, STEPS)
        assert found["late"] == (2 * STEPS, STEPS)
        assert found["stopped"] == (1 + 2, 2)
