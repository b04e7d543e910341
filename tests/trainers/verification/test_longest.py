"""A row that would end the training in a later step ends it before the first, with what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device.work import opened
from tests.ranks import run_ranks
from tests.tiny import shard_locally, tiny_job
from tests.trainers.tasks import small
from tests.trainers.training.test_training import Recorder
from trainers.errors import TrainingError, may_pass
from trainers.job.schema import Job
from trainers.model.world import World
from trainers.verification.longest import check_longest

pytestmark = pytest.mark.slow
LONG = 90
"""Words, where the model has 64 positions."""


def launch(jobs: dict[str, Job]) -> dict[str, tuple[str, bool, int]]:
    """What each job ends with, whether it may pass, and the steps that it took."""
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    found = {}
    for name, job in jobs.items():
        told = Recorder()
        try:
            run_rank(find_run(job), told)
            found[name] = ("", False, steps_of(told))
        except Exception as error:
            found[name] = (f"{type(error).__name__}: {error}", may_pass(error), steps_of(told))
    return found


def steps_of(told: Recorder) -> int:
    return sum(event.kind == "step" for event in told.events)


def job_of(folder: Path, task: str, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Job:
    sections["train"] = {"verify": False, "global_batch_size": 4, "steps": 2, **sections.get("train", {})}
    job = tiny_job(folder, model, task, rows, **sections)
    shard_locally(job)
    return job


def jobs_of(folder: Path, words: int) -> dict[str, Job]:
    """Jobs of tasks that do not pack, in which one training row has so many words."""
    model = small.bert(folder / "bert")
    text = " ".join(["dog"] * words)
    texts = [{"text": row["source"], "label": row["source"][:3]} for row in small.echo_rows(40)]
    long = {
        "classify": (texts, {"text": text, "label": "dog"}),
        "tag": (small.tag_rows(40), {"tokens": text.split(), "tags": ["O"] * words}),
        "mlm": (small.plain_rows(40), {"text": text}),
    }
    data = {"max_length": 128}
    return {
        f"{task} {way}": job_of(
            folder / f"{task}-{way}", task, model, [*rows, row], data=data, train={"deepspeed": way}
        )
        for way in ("zero0", "zero3")
        for task, (rows, row) in long.items()
    }


def test_a_row_past_the_model_s_positions_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (found,) = run_ranks(launch, 1, jobs_of(tmp_path / "long", LONG))
    assert len(found) == 6
    for name, (error, passes, steps) in found.items():
        assert error.startswith("TrainingError: a micro-batch of the longest training rows (4 of up to 92 tokens)"), (
            name
        )
        assert "the model has 64 positions" in error and "data.max_length" in error, name
        assert (passes, steps) == (False, 0), name
    (fitting,) = run_ranks(launch, 1, jobs_of(tmp_path / "fitting", 30))
    assert set(fitting.values()) == {("", False, 2)}


class Greedy:
    """A loss that no memory holds."""

    def step_loss(self, *_: Any) -> Any:
        return torch.empty(2**50)


class Alone:
    """A loss that waits for ranks that are not there."""

    def step_loss(self, *_: Any) -> Any:
        torch.distributed.all_reduce(torch.zeros(1))


def test_want_of_memory_is_named_and_may_pass_and_a_lost_peer_is_no_matter_of_rows(tmp_path: Path) -> None:
    job = job_of(tmp_path, "tag", small.bert(tmp_path / "bert"), small.tag_rows(40))
    task, encoder, rows, packs = opened(job)
    model = task.load_model(job.model.path, pad_id=encoder.pad_id, trust_remote_code=False)
    with pytest.raises(
        TrainingError, match=r"longest training rows \(4 of up to \d+ tokens\).*GiB of memory"
    ) as caught:
        check_longest(model, Greedy(), task, rows, packs, 4, encoder.pad_id, World(0, 1, torch.device("cpu")))
    assert may_pass(caught.value)
    with pytest.raises(ValueError, match="process group"):
        check_longest(model, Alone(), task, rows, packs, 4, encoder.pad_id, World(0, 1, torch.device("cpu")))
