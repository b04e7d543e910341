"""After a divergence the first engine is gone, with all its memory, before the second is built."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.model.test_memory import live_bytes
from tests.trainers.training.test_training import Recorder, with_
from trainers.job.schema import Job
from trainers.records import Phase
from trainers.storage import Folder

pytestmark = pytest.mark.slow
WAYS = ("zero0", "zero1", "zero2", "zero3", "zero3-cpu-offload")


def roll_back(jobs: list[Job]) -> list[tuple[list[int], list[bool]]]:
    """Of runs that diverge at their fifth step: bytes of tensors alive when each engine is built, and whether the one
    before it is alive."""
    from trainers.run.record import find_run
    from trainers.training import loop
    from trainers.training.divergence import SkippedSteps
    from trainers.worker import rank

    build, found = rank.build_engine, []
    for number, job in enumerate(jobs):
        sizes: list[int] = []
        engines: list[Any] = []
        alive: list[bool] = []

        def build_engine(*arguments: Any, sizes: Any = sizes, engines: Any = engines, alive: Any = alive) -> Any:
            alive += [engine() is not None for engine in engines]
            sizes.append(live_bytes())
            engine = build(*arguments)
            engines.append(weakref.ref(engine))
            return engine

        told = iter([None] * 4 + ["a spike"])
        loop.divergence = lambda *_, told=told: next(told, None)
        rank.build_engine = build_engine
        run = find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / str(number)})
        rank.run_rank(run, Recorder())
        assert SkippedSteps.model_validate(run.folder.read_json("skipped.json")).numbers == {4}
        found.append((sizes, alive))
        gc.collect()
    return found


def test_the_engine_that_diverged_is_gone_before_the_next_is_built(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "sft", chat_rows(30), data={"max_length": 256}, train={"global_batch_size": 4})
    shard_locally(job)
    (found,) = run_ranks(roll_back, 1, [with_(job, train={"deepspeed": way}) for way in WAYS])
    weights = (model / "model.safetensors").stat().st_size
    for way, ((first, second), alive) in zip(WAYS, found, strict=True):
        assert alive == [False], way
        assert second - first < weights / 10, way


def diverge_while_saving(job: Job) -> list[tuple[str, bool]]:
    """The phase of each wait for the last commit, and whether what is left out was written down by then."""
    from trainers.checkpoint.checkpointer import Checkpointer
    from trainers.run.record import find_run
    from trainers.training import loop
    from trainers.worker import rank

    class Phases(Recorder):
        phase = ""

        def at(self, phase: Phase, step: int) -> None:
            super().at(phase, step)
            self.phase = phase

    hooks, run, found = Phases(), find_run(job), []

    class Waiting(Checkpointer):
        def finish(self) -> None:
            found.append((hooks.phase, run.folder.exists("skipped.json")))
            super().finish()

    told = iter([None] * 4 + ["a spike"])
    loop.divergence = lambda *_: next(told, None)
    rank.Checkpointer = Waiting  # type: ignore[misc]
    rank.run_rank(run, hooks)
    return found


def test_what_is_left_out_is_on_record_before_the_wait_for_a_save_which_is_no_hang(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    steps, often = {"global_batch_size": 4, "steps": 6}, {"every_steps": 4}
    job = tiny_job(tmp_path, model, "sft", chat_rows(30), train=steps, checkpoint=often)
    shard_locally(job)
    (found,) = run_ranks(diverge_while_saving, 1, job)
    assert found == [("load", False), ("commit", True), ("load", True), ("commit", True)]
