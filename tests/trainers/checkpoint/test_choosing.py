"""Which checkpoint the ranks go on from: what cannot be read is not damaged, rank 0 decides, nobody follows blindly.

The ranks are threads here, each with its own view of one folder: bindfs mounts that remember for a while what they saw
or missed, two clients of a real NFS server, and a mount that fails at random. tests/benchmarks/bench_crashes.py runs
hundreds of rounds.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounts import failing_view, lagging_views, missing_for_mounts
from tests.nfs import missing_for_nfs, run_on_nfs
from tests.thread_ranks import ThreadRanks, run_threads
from tests.trainers.checkpoint.test_files import write_step
from trainers import patience
from trainers.checkpoint.choosing import choose_checkpoint
from trainers.checkpoint.cleaning import clean_leftovers, finish_removals, remove_checkpoint
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import COMMITTED, MANIFEST
from trainers.errors import TrainingError
from trainers.run.folder import step_name
from trainers.storage import Folder

needs_mounts = pytest.mark.skipif(missing_for_mounts() is not None, reason=str(missing_for_mounts()))


def resume_on(views: list[Path], events: list[Any] | None = None, **options: Any) -> list[Any]:
    """What each rank goes on from, a step and a value, or the error it ends with; rank r looks through view r."""
    told = events if events is not None else []

    def work(rank: int, ranks: ThreadRanks) -> Any:
        reader = choose_checkpoint(Folder(str(views[rank])), ranks, told.append, **options)
        return reader and (reader.state.step, float(reader.read("weight", "w", 0, 10)[7]))

    return run_threads(len(views), work)


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Folder]:
    """Three committed checkpoints."""
    folder = Folder(str(tmp_path / "checkpoints"))
    for step in (1, 2, 3):
        write_step(folder, step)
    yield folder


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EMFILE])
def test_an_error_of_reading_condemns_no_checkpoint(
    steps: Folder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    events: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(patience, "RETRY_S", 0.1)
        patch.setattr(os, "preadv", failing(number))
        (error,) = resume_on([steps.path], events)
        assert isinstance(error, OSError) and error.errno == number
    assert committed_steps(steps) == [1, 2, 3] and events == []
    assert resume_on([steps.path]) == [(3, 10.0)]


def failing(number: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_error_that_passes_is_no_error(steps: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, []

    def flaky(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) % 3:
            raise OSError(errno.EIO, "passing")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    assert resume_on([steps.path]) == [(3, 10.0)]


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_only_if_told(steps: Folder) -> None:
    for step in (1, 2, 3):
        (steps.path / step_name(step) / "rank-00001-of-00002.safetensors").write_bytes(b"x")
    events: list[Any] = []
    (error,) = resume_on([steps.path], events)
    assert isinstance(error, TrainingError) and "checkpoint.start_over" in str(error)
    assert [event.step for event in events] == [3, 2, 1]
    (error,) = resume_on([steps.path])
    assert isinstance(error, TrainingError), "also at the next start"
    assert resume_on([steps.path], start_over=True) == [None]
    assert all((steps / f"damaged-{step_name(step)}").exists(COMMITTED) for step in (1, 2, 3)), "not a byte is lost"


def test_what_one_rank_alone_finds_wrong_is_not_damage(steps: Folder, tmp_path: Path) -> None:
    """Rank 1 looks at another state of the folder: it fails by name, and nothing is set aside."""
    other = tmp_path / "other"
    write_step(Folder(str(other)), 3)
    for path in (other / step_name(3)).glob("rank-00001*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    first, second = resume_on([steps.path, other])
    for error in (first, second):
        assert isinstance(error, OSError)
        assert "rank 1 on" in str(error) and "rank-00001-of-00002.safetensors" in str(error) and "rank 0" in str(error)
    assert committed_steps(steps) == [1, 2, 3]


def test_a_removal_survives_what_an_earlier_one_left(steps: Folder) -> None:
    """NFS keeps the files that somebody has open, and with them the folder."""
    left = steps.path / f".tmp-{step_name(1)}"
    left.mkdir()
    (left / ".nfs0001").touch()
    for _ in range(2):
        remove_checkpoint(steps, 1)
        assert committed_steps(steps) == [2, 3]
    finish_removals()
    assert [path.name for path in steps.path.glob(".tmp-*")] == [left.name]


def test_a_checkpoint_that_shows_its_manifest_late_is_not_removed(steps: Folder) -> None:
    (steps.path / step_name(3) / COMMITTED).unlink()
    assert [event.step for event in clean_leftovers(steps)] == [3]
    assert committed_steps(steps) == [1, 2, 3]


def look_by_name(view: Path, step: int) -> None:
    """Ask for what is not there yet, as a rank that polls would: this host now remembers that it is absent."""
    for name in (COMMITTED, MANIFEST, "state.json", "rank-00000-of-00002.safetensors"):
        (view / step_name(step) / name).exists()


def follow_rank_0(a: Path, b: Path) -> None:
    """Host B remembers for a while that step 2 is not there; whoever is rank 0, all go on from step 2."""
    write_step(Folder(str(a)), 1)
    (b / step_name(1) / COMMITTED).exists()
    (a / step_name(2)).mkdir()
    look_by_name(b, 2)
    write_step(Folder(str(a)), 2)
    assert not (b / step_name(2) / COMMITTED).exists(), "the view does not lag: the test would see nothing"
    events: list[Any] = []
    found = resume_on([a, b], events)
    assert found == [(2, 9.0)] * 2, found
    look_by_name(a, 3)
    look_by_name(b, 3)
    write_step(Folder(str(b)), 3)
    assert resume_on([a, b, b], events) == [(3, 10.0)] * 3, "rank 0 lags, and a rank came"
    assert resume_on([b], events) == [(3, 10.0)], "elastic shrink"
    assert CheckpointReader(LocalCopies(Folder(str(a / step_name(3))))).state.step == 3, "an evaluation"
    assert events == []


@needs_mounts
@pytest.mark.slow
@pytest.mark.cluster
def test_ranks_with_a_view_that_lags_follow_rank_0(tmp_path: Path) -> None:
    with lagging_views(tmp_path, lag_s=8) as (a, b):
        follow_rank_0(a, b)


@pytest.mark.skipif(missing_for_nfs() is not None, reason=str(missing_for_nfs()))
@pytest.mark.slow
@pytest.mark.cluster
def test_ranks_on_two_nfs_clients_follow_rank_0(tmp_path: Path) -> None:
    assert "followed" in run_on_nfs(tmp_path, 8, "tests.trainers.checkpoint.nfs_views")


@needs_mounts
@pytest.mark.slow
@pytest.mark.cluster
def test_a_mount_that_fails_at_random_costs_nothing(steps: Folder, tmp_path: Path) -> None:
    with failing_view(tmp_path, steps.path) as (view, control):
        control.write_text("0.2 EIO ESTALE")
        for world in (1, 2, 3):
            assert resume_on([view] * world) == [(3, 10.0)] * world
        control.write_text("0")
    assert committed_steps(steps) == [1, 2, 3]
