"""Puts a checkpoint on storage and commits it: rank files, then each rank's vote, then the manifest, then COMMITTED.

Ranks agree through files alone: each writes its own and its vote, rank 0 waits for the votes. A vote carries the save
that it belongs to, so leftovers of a killed attempt are never taken for this one's. Torch-free: the writer process
(`writer.py`) runs this beside the training.
"""

import shutil
import time

import xxhash

from trainers.checkpoint.records import (
    COMMITTED,
    HISTORY,
    MANIFEST,
    STATE,
    CheckpointManifest,
    CheckpointState,
    FileRecord,
    Save,
    Vote,
    rank_file,
    vote_file,
)
from trainers.storage import Folder

VOTE_TIMEOUT_S = 600.0
BLIND_TIMEOUT_S = 10.0
"""How long votes are waited for where this rank's own file failed: the others may be unable even to vote."""
POLL_S = 0.02
CHUNK_BYTES = 1 << 22
"""Written and digested at once: what the digest has just read is still in the processor's cache when it is written."""


def write_share(folder: Folder, save: Save, data: memoryview, total_bytes: int) -> Vote:
    """Write this rank's file, then its vote. A failure to write becomes the vote.

    Args:
        total_bytes: what all ranks are about to write, for the check of the disk.
    """
    try:
        check_space(folder, total_bytes)
        vote = Vote(save=save.id, file=write_file(folder, rank_file(save.rank, save.world_size), data))
    except OSError as error:
        vote = Vote(save=save.id, error=f"{type(error).__name__}: {error}")
    cast_vote(folder, save, vote)
    return vote


def check_space(folder: Folder, num_bytes: int) -> None:
    """Compare what is about to be written with what is free; a bucket has no end.

    Raises:
        OSError: with both figures.
    """
    if not folder.is_local:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.path).free
    if num_bytes > free:
        raise OSError(
            f"the checkpoint needs {num_bytes:,} bytes and {free:,} are free in {folder.path}: make room or set "
            "checkpoint.keep lower"
        )


def write_file(folder: Folder, name: str, data: memoryview) -> FileRecord:
    """Write one file, whole and synced or not at all, and digest it on the way."""
    digest = xxhash.xxh3_128()
    with folder.open_output(name) as stream:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            digest.update(chunk)
            stream.write(chunk)
    return FileRecord(bytes=len(data), digest=digest.hexdigest())


def cast_vote(folder: Folder, save: Save, vote: Vote) -> None:
    """Leave a rank's vote beside its file."""
    folder.write_bytes(vote_file(save.rank, save.world_size), vote.model_dump_json().encode())


def commit(folder: Folder, save: Save, state: CheckpointState, history: str = "[]", blind: bool = False) -> int:
    """Rank 0: wait for every vote, then write manifest and marker. Returns the bytes of all files.

    Args:
        history: events of the last steps, as JSON.
        blind: this rank's own file failed, so that others may be unable to vote.

    Raises:
        OSError: where a rank could not write, its vote did not come, or the disk is full; nothing is committed then.
    """
    files = _gather_votes(folder, save, BLIND_TIMEOUT_S if blind else VOTE_TIMEOUT_S)
    files[HISTORY] = _write(folder, HISTORY, history)
    files[STATE] = _write(folder, STATE, state.model_dump_json(indent=1))
    digest = _write(folder, MANIFEST, CheckpointManifest(files=files).model_dump_json(indent=1)).digest
    folder.write_bytes(COMMITTED, digest.encode())
    return sum(file.bytes for file in files.values())


def _write(folder: Folder, name: str, text: str) -> FileRecord:
    data = text.encode()
    folder.write_bytes(name, data)
    return FileRecord(bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))


def _gather_votes(folder: Folder, save: Save, timeout_s: float) -> dict[str, FileRecord]:
    """Every rank's file. Waits for all votes, so that nobody is still writing when this raises."""
    deadline = time.monotonic() + timeout_s
    votes = {rank: _await_vote(folder, save, rank, deadline) for rank in range(save.world_size)}
    bad = {rank: vote.error if vote else "no vote came" for rank, vote in votes.items() if not vote or not vote.file}
    if bad:
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in bad.items())
        raise OSError(f"{folder.name} is not committed: {reasons}")
    return {rank_file(rank, save.world_size): vote.file for rank, vote in votes.items() if vote and vote.file}


def _await_vote(folder: Folder, save: Save, rank: int, deadline: float) -> Vote | None:
    while time.monotonic() < deadline:
        vote = read_vote(folder, rank, save.world_size)
        if vote is not None and vote.save == save.id:
            return vote
        time.sleep(POLL_S)
    return None


def read_vote(folder: Folder, rank: int, world_size: int) -> Vote | None:
    """A rank's vote, if there is one."""
    try:
        return Vote.model_validate_json(folder.read_bytes(vote_file(rank, world_size)))
    except FileNotFoundError:
        return None
