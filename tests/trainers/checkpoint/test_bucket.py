"""Checkpoints in a bucket, spoken to by the S3 protocol on loopback: marker last, one pass over the bytes, resume."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bucket import Bucket, serve_bucket
from tests.crashing import next_start, start_light
from tests.ranks import run_ranks
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.training.test_training import Recorder
from tests.trainers.training.test_world_sizes import named_run
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import rank_file
from trainers.job.schema import Job
from trainers.run.folder import step_name
from trainers.storage import Folder

pytestmark = pytest.mark.slow
VALUES = 100_000


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serve_bucket() as yard:
        yield yard


def test_the_marker_is_the_last_object_and_old_steps_go(bucket: Bucket, tmp_path: Path) -> None:
    place = bucket.folder("light")
    job = start_light(tmp_path / "one", place, steps=3, values=VALUES, keep=2)
    assert job.join() == [0, 0]
    assert [one["error"] for one in job.said()] == [None] * 3
    assert committed_steps(place) == [2, 3]
    for step in (1, 2, 3):
        put = bucket.puts(f"light/{step_name(step)}")
        assert put[-4:] == ["history.json", "state.json", "manifest.json", "COMMITTED"]
    assert next_start(place, VALUES).step == 3


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 0.3])
def test_a_kill_at_any_time_leaves_whole_checkpoints_or_none(bucket: Bucket, tmp_path: Path, after_s: float) -> None:
    place = bucket.folder(f"killed-{after_s}")
    job = start_light(tmp_path / "one", place, steps=6, values=VALUES)
    while "COMMITTED" not in bucket.puts(f"killed-{after_s}/{step_name(1)}"):  # asking the server would hold it up
        assert any(rank.is_alive() for rank in job.ranks), f"ended without a checkpoint: {job.said()}"
        time.sleep(0.01)
    time.sleep(after_s)
    job.kill()
    bucket.settle()
    start = next_start(place, VALUES)  # commits what lacks its marker alone
    committed = committed_steps(place)
    assert all(find_damage(LocalCopies(place / step_name(step))) is None for step in committed)
    assert start.step == committed[-1]
    assert [name for name in place.list() if name.startswith("step-")] == [step_name(step) for step in committed]


def test_a_bucket_that_refuses_writes_costs_the_checkpoint_and_is_named(bucket: Bucket, tmp_path: Path) -> None:
    (bucket.folder("refused") / step_name(1)).write_bytes("begun", b"")
    bucket.read_only = True
    try:
        job = start_light(tmp_path / "one", bucket.folder("refused"), steps=1, values=VALUES)
        assert job.join() == [0, 0]
    finally:
        bucket.read_only = False
    (said,) = job.said()
    assert "ACCESS_DENIED" in said["error"] and "stays" in said["error"]
    assert "writer process died" not in said["error"]
    assert committed_steps(bucket.folder("refused")) == []


def test_checking_and_reading_a_rank_costs_one_download_of_its_file(bucket: Bucket, tmp_path: Path) -> None:
    place = bucket.folder("once")
    assert start_light(tmp_path / "one", place, steps=1, values=VALUES).join() == [0, 0]
    bucket.asked.clear()
    files = LocalCopies(place / step_name(1))
    assert find_damage(files, slice(1, None, 2)) is None
    reader = CheckpointReader(files)
    assert len(reader.read("exp_avg", "w", VALUES, 2 * VALUES)) == VALUES
    got = Counter(key.rpartition("/")[2] for method, key, _ in bucket.asked if method == "GET")
    assert got[rank_file(1, 2)] <= 3, "its bytes once; its header, in two reads, for the index"
    assert got[rank_file(0, 2)] <= 2, "of the other rank's file the header alone"


def train_into(job: Job, run: str, stop_after: int | None) -> list[dict[str, Any]]:

    import trainers.worker.rank

    hooks = Recorder(stop_after)
    trainers.worker.rank.run_rank(named_run(job, "unused").model_copy(update={"folder": Folder(run)}), hooks)
    return hooks.events


def train_twice(job: Job, stopped: str, whole: str) -> list[dict[int, float]]:
    runs = [train_into(job, stopped, 3), train_into(job, stopped, None), train_into(job, whole, None)]
    return [{event.step: event.loss for event in events if event.kind == "step"} for events in runs]


def test_a_run_in_a_bucket_is_stopped_and_goes_on_bit_for_bit(
    bucket: Bucket, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    job: Job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(60))
    shard_locally(job)
    begun, resumed, whole = run_ranks(train_twice, 2, job, bucket.folder("a").uri, bucket.folder("b").uri)[0]
    assert (list(begun), list(resumed)) == ([1, 2, 3], [4, 5, 6])
    assert begun | resumed == whole
    assert committed_steps(bucket.folder("a") / "checkpoints") == [3, 6]
