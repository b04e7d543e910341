"""Killed, cut short, damaged, out of disk: the next start loads the newest whole checkpoint, never a damaged byte.

Most injections drive the real buffers, writer processes, commits and readers on made-up values without
torch.distributed; the last tests run real ranks with a ZeRO-3 engine. The places of the kills are drawn anew from fixed
seeds, by bytes written. tests/benchmarks/bench_crashes.py runs hundreds, beside DeepSpeed's own checkpoints.
"""

import random
import re
from pathlib import Path

import pytest

from tests.crashing import (
    Launched,
    copy_job,
    damage_file,
    is_alive,
    kill,
    loaded_by,
    next_start,
    small_disk,
    start_engines,
    start_light,
    wait_for_bytes,
)
from trainers.checkpoint.cleaning import finish_removals
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.records import rank_file
from trainers.run.folder import step_name
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
VALUES = 1_000_000
"""12 MB a rank, so that a kill finds a file half-written."""
SIZE = 3 * 4 * VALUES


def whole_steps(checkpoints: Path) -> list[int]:
    """Committed steps whose digests hold."""
    place = Folder(str(checkpoints))
    return [step for step in committed_steps(place) if find_damage(LocalCopies(place / step_name(step))) is None]


def await_bytes(job: Launched, checkpoints: Path, step: int, dice: random.Random) -> None:
    """Wait until a random rank has written a random part of a step's file."""
    rank, offset = dice.randrange(2), dice.randrange(SIZE)
    place = checkpoints / step_name(step)
    assert wait_for_bytes(place, rank_file(rank, 2), offset, lambda: all(one.is_alive() for one in job.ranks))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("whom", ["a rank", "everything"])
def test_a_kill_at_any_byte_leaves_the_newest_commit(tmp_path: Path, whom: str, seed: int) -> None:
    dice = random.Random(f"{whom} {seed}")
    checkpoints = tmp_path / "checkpoints"
    job = start_light(tmp_path / "one", checkpoints, steps=4, values=VALUES)
    step = dice.randrange(1, 4)
    await_bytes(job, checkpoints, step, dice)
    doomed = job.ranks if whom == "everything" else [dice.choice(job.ranks)]
    for rank in doomed:
        rank.kill()
    job.kill()
    whole = whole_steps(checkpoints)
    found = next_start(checkpoints, VALUES)
    again = [one.step for one in found.told if one.kind == "checkpoint"]
    assert found.step == max([*whole, *again], default=0)  # killed between manifest and marker, it is committed again
    assert found.step >= max((one["step"] for one in job.said()), default=0) >= step - 1
    assert whole_steps(checkpoints) == sorted([*whole, *again])
    assert all("never committed" in one.reason for one in found.told if one.step not in again)
    finish_removals()
    assert not list(checkpoints.rglob(".tmp-*"))


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_writer_costs_nothing(tmp_path: Path, seed: int) -> None:
    """Its rank still holds the state: a new process writes it again, and the run never notices. A step follows the last
    one that is looked for, or the job might be over before the writer is killed."""
    dice = random.Random(seed)
    checkpoints = tmp_path / "checkpoints"
    job = start_light(tmp_path / "one", checkpoints, steps=4, values=VALUES)
    await_bytes(job, checkpoints, dice.randrange(1, 4), dice)
    killed = dice.choice(job.writers())
    kill(killed)
    assert job.join() == [0, 0]
    assert not is_alive(killed)
    assert [(one["step"], one["error"]) for one in job.said()] == [(1, None), (2, None), (3, None), (4, None)]
    assert next_start(checkpoints, VALUES).step == 4


@pytest.fixture(scope="module")
def three_commits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a small job, steps 1 to 3."""
    folder = tmp_path_factory.mktemp("three")
    job = start_light(folder / "one", folder / "checkpoints", steps=3, values=1000)
    assert job.join() == [0, 0]
    return folder / "checkpoints"


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_is_found_named_and_passed_over(three_commits: Path, tmp_path: Path, how: str) -> None:
    dice = random.Random(how)
    place = three_commits / step_name(3)
    votes = "-of-00002.json"  # never read again
    names = [path.name for path in place.iterdir() if not path.name.endswith(votes)]
    assert len(names) == 6
    for number in range(30):
        name = names[number % len(names)]
        checkpoints = copy_job(three_commits, tmp_path / str(number))
        damage_file(checkpoints / step_name(3) / name, how, dice)
        found = next_start(checkpoints, 1000)
        (told,) = found.told
        assert told.step == 3
        if (how, name) == ("missing", "COMMITTED"):
            assert found.step == 3 and told.kind == "checkpoint"
            continue
        assert found.step == 2
        assert name in told.reason or "manifest" in told.reason
        assert whole_steps(checkpoints) == [1, 2]
        assert (checkpoints / "damaged-step-00000003").is_dir()


def test_damage_to_all_but_the_oldest_leaves_the_oldest(three_commits: Path, tmp_path: Path) -> None:
    checkpoints = copy_job(three_commits, tmp_path / "copy")
    for step in (2, 3):
        damage_file(checkpoints / step_name(step) / rank_file(1, 2), "flipped", random.Random(step))
    found = next_start(checkpoints, 1000)
    assert (found.step, [one.step for one in found.told]) == (1, [3, 2])


def test_a_disk_that_is_full_beforehand_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    """Room for two; the third is refused before a byte is written, with both figures, and the ranks go on."""
    try:
        disk = small_disk(tmp_path / "disk", 3 * 2 * SIZE - SIZE)
    except OSError as error:
        pytest.skip(str(error))
    with disk as place:
        job = start_light(tmp_path / "one", place / "checkpoints", steps=4, values=VALUES)
        assert job.join() == [0, 0]
        said = {one["step"]: one["error"] for one in job.said()}
        assert (said[1], said[2]) == (None, None)
        for step in (3, 4):
            assert "the checkpoint needs 24,00" in said[step]
            assert "bytes and" in said[step] and "are free in" in said[step]
        assert next_start(place / "checkpoints", VALUES).step == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_that_fills_up_meanwhile_costs_the_checkpoint_alone(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    try:
        disk = small_disk(tmp_path / "disk", 3 * 2 * SIZE + SIZE)
    except OSError as error:
        pytest.skip(str(error))
    with disk as place:
        checkpoints = place / "checkpoints"
        job = start_light(tmp_path / "one", checkpoints, steps=3, values=VALUES)
        await_bytes(job, checkpoints, 2, dice)
        with (place / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
            while True:
                other.write(bytes(1 << 20))
        assert job.join() == [0, 0]
        said = {one["step"]: one["error"] for one in job.said()}
        newest = max(step for step, error in said.items() if error is None)
        errors = [error for error in said.values() if error is not None]
        assert said[1] is None and errors, "what a failed step 2 gives back may be room enough for step 3"
        assert all(re.search("are free in|No space left|too full", error) for error in errors), errors
        assert next_start(checkpoints, VALUES).step == newest
        (place / "other").unlink()
        again = start_light(tmp_path / "two", checkpoints, steps=newest + 1, values=VALUES, first=newest, keep=1)
        assert again.join() == [0, 0]
        assert next_start(checkpoints, VALUES).step == newest + 1


@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "writer 0"])
def test_real_ranks_with_an_engine_go_on_from_the_newest_commit(tmp_path: Path, whom: str) -> None:
    checkpoints, dice = tmp_path / "checkpoints", random.Random(whom)
    job = start_engines(tmp_path, "ours", steps=4)
    size = 3 * 4 * 4 * (384 * 384 + 384) // 2
    number = int(whom[-1])
    alive = all(wait_for_bytes(checkpoints / step_name(3), rank_file(r, 2), dice.randrange(size), job.ranks[r].is_alive)
                for r in (number,))  # fmt: skip
    assert alive
    if whom.startswith("writer"):
        kill(job.writers()[number])
        assert job.join() == [0, 0]
        expected = 4
    else:
        job.ranks[number].kill()
        job.kill()
        expected = max(whole_steps(checkpoints))
        assert expected >= 1  # of step 2 the marker may still be missing
    assert loaded_by(start_engines(tmp_path, "ours", steps=0, load=True)) == (expected, None)
