"""Checkpoint files without an engine: committed or absent, damage found, any span read back, who may be deleted."""

import contextlib
import errno
import io
import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from trainers.checkpoint.cleaning import clean_leftovers, finish_removals, quarantine, remove_checkpoint
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import CheckpointState, Save, Vote
from trainers.checkpoint.retention import KeptCheckpoints, deletable
from trainers.checkpoint.writing import commit, read_vote, write_share
from trainers.run.folder import step_name
from trainers.storage import TEMPORARY, Folder
from trainers.tensor_file import plan_file, spec_of, write_tensors

WEIGHT = torch.arange(10, dtype=torch.float32)


def save_of(rank: int, world_size: int = 2, save: str = "one") -> Save:
    return Save(id=save, rank=rank, world_size=world_size)


def write_rank(folder: Folder, save: Save, values: torch.Tensor, start: int) -> None:
    """One rank's file, as its writer process would find it in memory, and its vote."""
    tensors = {f"{kind}/w": values.clone() for kind in ("weight", "exp_avg", "exp_avg_sq")}
    stream, specs = io.BytesIO(), [spec_of(name, tensor) for name, tensor in tensors.items()]
    write_tensors(stream, specs, tensors.__getitem__, {"starts": json.dumps({"w": start})})
    write_share(folder, save, memoryview(stream.getvalue()), 1)


def vote_of(folder: Folder, world_size: int = 2, save: str = "one") -> Vote:
    """Rank 0's vote."""
    vote = read_vote(folder, save_of(0, world_size, save))
    assert vote is not None
    return vote


def write_step(checkpoints: Folder, step: int, world_size: int = 2) -> Folder:
    """A committed checkpoint of one parameter of ten values, split over the ranks."""
    folder = checkpoints / step_name(step)
    part = -(-10 // world_size)
    for rank in range(world_size):
        values = WEIGHT[rank * part : (rank + 1) * part] + step
        write_rank(folder, save_of(rank, world_size), values, rank * part)
    commit(folder, vote_of(folder, world_size), world_size, state_of(step, world_size))
    return folder


def state_of(step: int, world_size: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        world_size=world_size,
        zero_stage=3,
        shapes={"w": [10]},
        trainable=("w",),
        tokens=1,
        train_key="k",
        job="j",
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "checkpoints"))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10), st.integers(0, 10))
def test_any_span_reads_back_whatever_world_size_wrote_it(
    tmp_path_factory: pytest.TempPathFactory, world_size: int, start: int, end: int
) -> None:
    folder = write_step(Folder(str(tmp_path_factory.mktemp("any"))), 7, world_size)
    start, end = min(start, end), max(start, end)
    assert CheckpointReader(LocalCopies(folder)).read("exp_avg", "w", start, end).equal(WEIGHT[start:end] + 7)


def test_a_span_that_no_file_covers_is_an_error(checkpoints: Folder) -> None:
    with pytest.raises(ValueError, match="has no values from 10 to 12"):
        CheckpointReader(LocalCopies(write_step(checkpoints, 1))).read("weight", "w", 5, 12)


def test_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.randn(2, 2, dtype=torch.float64),
        "c": torch.tensor(True),
        "d": torch.empty(0, 4),
        "e": torch.arange(7, dtype=torch.int8),
    }
    with (tmp_path / "x.safetensors").open("wb") as stream:
        found = write_tensors(
            stream, [spec_of(k, t) for k, t in tensors.items()], tensors.__getitem__, {"format": "pt"}
        )
    assert found.bytes == (tmp_path / "x.safetensors").stat().st_size
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert file.get_tensor(name).equal(tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_a_file_is_where_its_plan_says(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.arange(5, dtype=torch.int8), "c": torch.randn(2, 2).double()}
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    stream = io.BytesIO()
    write_tensors(stream, specs, tensors.__getitem__, {"x": "y"})
    layout = plan_file(specs, {"x": "y"})
    assert layout.num_bytes == len(stream.getvalue())
    assert stream.getvalue().startswith(layout.header)
    for spec in specs:
        data = tensors[spec.name].numpy().tobytes()
        assert stream.getvalue()[layout.offsets[spec.name] :].startswith(data)


def test_the_marker_comes_last_and_readers_see_nothing_before_it(
    checkpoints: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Folder.write_bytes

    def noting(self: Folder, name: str, data: bytes) -> None:
        assert committed_steps(checkpoints) == []
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Folder, "write_bytes", noting)
    write_step(checkpoints, 3)
    assert written[-4:] == ["history.json", "state.json", "manifest.json", "COMMITTED"]
    assert committed_steps(checkpoints) == [3]


@pytest.mark.parametrize(
    "name", ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_every_damage_to_every_file_is_found(checkpoints: Folder, name: str, damage: str) -> None:
    folder = write_step(checkpoints, 1)
    assert find_damage(LocalCopies(folder)) is None
    path = folder.path / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "truncate":
        path.write_bytes(bytes(data[:-1]))
    else:
        path.unlink()
    found = find_damage(LocalCopies(folder))
    assert found is not None
    assert name in found or "manifest" in found


def test_ranks_that_share_the_checking_find_it_together(checkpoints: Folder) -> None:
    folder = write_step(checkpoints, 1, world_size=3)
    path = folder.path / "rank-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    found = [find_damage(LocalCopies(folder), slice(rank, None, 2)) for rank in range(2)]
    assert sum(one is not None for one in found) == 1


def test_a_quarantined_checkpoint_is_out_of_sight_with_its_reason(checkpoints: Folder) -> None:
    write_step(checkpoints, 1)
    write_step(checkpoints, 2)
    quarantine(checkpoints, 2, "a bit flipped")
    assert committed_steps(checkpoints) == [1]
    assert (checkpoints / "damaged-step-00000002").read_bytes("QUARANTINED") == b"a bit flipped"
    assert write_step(checkpoints, 2).exists("COMMITTED")


def test_leftovers_of_a_killed_launch_are_never_taken_for_this_ones(checkpoints: Folder) -> None:
    torn = checkpoints / step_name(2)
    write_rank(torn, save_of(0, save="killed"), WEIGHT, 0)
    write_rank(torn, save_of(1, save="killed"), WEIGHT, 0)
    write_rank(torn, save_of(0, save="new"), WEIGHT + 1, 0)
    late = threading.Timer(0.3, write_rank, (torn, save_of(1, save="new"), WEIGHT + 2, 10))
    late.start()
    commit(torn, vote_of(torn, save="new"), 2, state_of(2, 2))
    assert find_damage(LocalCopies(torn)) is None
    assert CheckpointReader(LocalCopies(torn)).read("weight", "w", 10, 20).equal(WEIGHT + 2)


def test_a_start_removes_what_was_never_committed_and_files_without_a_name(checkpoints: Folder) -> None:
    whole = write_step(checkpoints, 1)
    write_rank(checkpoints / step_name(3), save_of(0, save="killed"), WEIGHT, 0)
    partial = whole.path / f"{TEMPORARY}12345678-rank-00000-of-00002.safetensors"
    partial.write_bytes(b"half")
    (event,) = clean_leftovers(checkpoints)
    finish_removals()
    assert event.step == 3 and event.kind == "checkpoint_skipped" and "never committed" in event.reason
    assert not partial.exists()
    assert [path.name for path in checkpoints.path.iterdir()] == [step_name(1)]
    assert find_damage(LocalCopies(whole)) is None


def test_files_without_a_name_go_while_other_folders_are_being_deleted(checkpoints: Folder) -> None:
    whole, over = write_step(checkpoints, 1), threading.Event()
    partial = whole.path / f"{TEMPORARY}12345678-rank-00000-of-00002.safetensors"

    def come_and_go() -> None:
        while not over.is_set():
            doomed = checkpoints.path / f"{TEMPORARY}{time.monotonic_ns()}-step-00000002"
            doomed.mkdir()
            with contextlib.suppress(FileNotFoundError):  # the start under test was quicker
                doomed.rmdir()

    others = [threading.Thread(target=come_and_go) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(50):
            partial.write_bytes(b"half")
            clean_leftovers(checkpoints)
            finish_removals()
            assert not partial.exists()
    finally:
        over.set()
        for other in others:
            other.join()


def test_a_commit_that_lost_its_marker_is_committed_again(checkpoints: Folder) -> None:
    write_step(checkpoints, 1)
    folder = write_step(checkpoints, 2)
    folder.delete("COMMITTED")
    (event,) = clean_leftovers(checkpoints)
    assert (event.kind, event.step) == ("checkpoint", 2)
    assert committed_steps(checkpoints) == [1, 2]
    assert find_damage(LocalCopies(folder)) is None


def test_a_removed_checkpoint_is_out_of_sight_at_once(checkpoints: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_step(checkpoints, 1)
    write_step(checkpoints, 2)
    with monkeypatch.context() as patch:  # as if killed before a single file was deleted
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        remove_checkpoint(checkpoints, 1)
    assert committed_steps(checkpoints) == [2]
    assert clean_leftovers(checkpoints) == []
    finish_removals()
    assert [path.name for path in checkpoints.path.iterdir()] == [step_name(2)]


def test_a_deletion_that_takes_long_holds_up_no_start(checkpoints: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_step(checkpoints, 1)
    write_rank(checkpoints / step_name(2), save_of(0, save="killed"), WEIGHT, 0)
    (checkpoints.path / f"{TEMPORARY}12345678-{step_name(9)}").mkdir()
    go_on, real = threading.Event(), shutil.rmtree

    def slow(path: Path, **options: Any) -> None:
        assert go_on.wait(60)
        real(path, **options)

    monkeypatch.setattr("shutil.rmtree", slow)
    assert [event.step for event in clean_leftovers(checkpoints)] == [2]
    assert committed_steps(checkpoints) == [1] and not (checkpoints.path / step_name(2)).exists()
    write_step(checkpoints, 2)  # the next launch saves the same step meanwhile
    go_on.set()
    finish_removals()
    assert sorted(path.name for path in checkpoints.path.iterdir()) == [step_name(1), step_name(2)]
    assert find_damage(LocalCopies(checkpoints / step_name(2))) is None


def test_a_full_disk_costs_this_checkpoint_and_says_both_figures(
    checkpoints: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step(checkpoints, 1)
    folder = checkpoints / step_name(2)
    free = shutil.disk_usage(checkpoints.path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free._replace(free=1234))
    votes = [write_share(folder, save_of(rank), memoryview(b"x" * 5000), 10_000) for rank in range(2)]
    assert all(re.search(r"needs 10,000 bytes and 1,\d{3} are free", vote.error or "") for vote in votes)
    with pytest.raises(OSError, match=r"rank 0: OSError: the checkpoint needs .*; rank 1: OSError: "):
        commit(folder, votes[0], 2, state_of(2, 2))
    assert committed_steps(checkpoints) == [1]


@settings(deadline=None)
@given(st.sets(st.integers(0, 100)), st.integers(1, 5), st.sets(st.integers(0, 100)))
def test_retention_never_deletes_the_newest_or_a_pinned_one(committed: set[int], keep: int, pinned: set[int]) -> None:
    gone = deletable(sorted(committed), keep, pinned)
    left = committed - set(gone)
    assert set(sorted(committed)[-keep:]) <= left
    assert committed & pinned <= left
    assert len(left) <= keep + len(pinned)


NOBODY = "s3://a:b@yard/kept?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"


@pytest.mark.parametrize("uri", ["local", NOBODY])
def test_storage_that_does_not_answer_while_a_checkpoint_goes_is_asked_again_at_the_next_time(
    checkpoints: Folder, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_step(checkpoints, step)
    kept = KeptCheckpoints(checkpoints, keep=1)
    with monkeypatch.context() as patch:
        if uri == "local":
            patch.setattr(Path, "rename", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        else:
            kept._folder = Folder(uri)
        kept.prune(())
    assert committed_steps(checkpoints) == [1, 2] and kept.steps == {2}
    kept._folder = checkpoints
    kept.prune(())
    finish_removals()
    assert committed_steps(checkpoints) == [2] and kept._going == set()
