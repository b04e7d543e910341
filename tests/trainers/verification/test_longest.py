"""A row that would end the training in a later step ends it before the first, with what it is."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import shard_locally, tiny_job
from tests.trainers.tasks import small
from tests.trainers.training.test_training import Recorder, with_
from trainers.job.schema import Job

pytestmark = pytest.mark.slow
LONG = 90
"""Words, where the model has 64 positions."""


def launch(jobs: dict[str, Job], room: int | None = None) -> dict[str, tuple[str, bool, int]]:
    """What each job ends with, whether it may pass, and the steps that it took; with so much more memory, in bytes."""
    from trainers.errors import may_pass
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    if room is not None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
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


def test_a_row_that_memory_does_not_hold_is_named_and_may_pass(tmp_path: Path) -> None:
    folder = small.bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    rows = [{"text": row["source"], "label": row["source"][:3]} for row in small.echo_rows(40)]
    rows.append({"text": " ".join(["dog"] * 4000), "label": "dog"})
    model = make_long(tmp_path / "positions", folder, config)
    job = job_of(tmp_path / "job", "classify", model, rows, data={"max_length": 4096}, train={"deepspeed": "zero0"})
    job = with_(job, model={"attention": "eager"})
    ((error, passes, steps),) = run_ranks(launch, 1, {"classify": job}, 700 * 2**20)[0].values()
    assert "the longest training rows (4 of up to 4002 tokens)" in error and "GiB of memory are free" in error
    assert (passes, steps) == (True, 0)


def make_long(folder: Path, model: Path, config: dict[str, Any]) -> Path:
    """The same model with 4,096 positions."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(**{**config, "max_position_embeddings": 4096})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
