"""Puts a checkpoint on storage and commits it: rank files, then each rank's vote, then the manifest, then COMMITTED.

Ranks agree through files alone: each writes its own and its vote, rank 0 waits for the votes. A vote carries the save
that it belongs to, so leftovers of a killed attempt are never taken for this one's. Torch-free: the writer process
(`writer.py`) runs this beside the training.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
    last_word_file,
    rank_file,
    vote_file,
)
from trainers.patience import retrying
from trainers.storage import Folder

VOTE_TIMEOUT_S = 600.0
BLIND_TIMEOUT_S = 10.0
"""How long votes are waited for where this rank's own file failed: the others may be unable even to vote."""
POLL_S, REFRESH_S = 0.02, 2.0
"""Seconds between two looks for votes, and between two looks past what this host remembers of the folder."""
PIECE_BYTES = 1 << 25
"""Written and synced, before the writer rests."""
CHUNK_BYTES = 1 << 22
"""Written and digested at once: what the digest has just read is still in the processor's cache when it is written."""


def write_share(
    folder: Folder, save: Save, data: memoryview, total_bytes: int, rest: Callable[[float], object] = float
) -> Vote:
    """Write this rank's file, then its vote. A failure to write becomes the vote.

    Args:
        total_bytes: what all ranks are about to write, for the check of the disk.
        rest: called after each piece with the seconds that it took.
    """
    return cast_vote(folder, save, write_rank_file(folder, save, _chunks(data), total_bytes, rest))


def write_rank_file(
    folder: Folder, save: Save, chunks: Iterable[memoryview], total_bytes: int, rest: Callable[[float], object] = float
) -> Vote:
    """Write this rank's file. Returns the vote, which is not cast yet; a failure to write becomes the vote."""
    try:
        check_space(folder, total_bytes)
        return Vote(save=save.id, file=write_file(folder, rank_file(save.rank, save.world_size), chunks, rest))
    except OSError as error:
        return Vote(save=save.id, error=f"{type(error).__name__}: {error}")


def find_refusal(folder: Folder) -> str | None:
    """Why a checkpoint may not be written here, or None: what is committed is never written over."""
    names = retrying(folder.list, f"listing {folder}")
    return f"{folder} is committed already" if COMMITTED in names else None


def check_space(folder: Folder, num_bytes: int) -> None:
    """Compare what is about to be written with what is free; a bucket has no end.

    Raises:
        OSError: with both figures.
    """
    if not folder.is_local:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    there = sum(_size_of(path) for path in folder.path.iterdir())  # by ranks that began earlier
    free = shutil.disk_usage(folder.path).free + there
    if num_bytes > free:
        raise OSError(
            f"the checkpoint needs {num_bytes:,} bytes and {free:,} are free in {folder.path}: make room or set "
            "checkpoint.keep lower"
        )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed since
        return 0


def write_file(folder: Folder, name: str, chunks: Iterable[memoryview], rest: Callable[[float], object]) -> FileRecord:
    """Write one file, whole and synced or not at all, and digest it on the way.

    Each piece is synced by itself: the kernel flushes a whole file without regard for the writer's low priority.
    """
    digest, written, synced = xxhash.xxh3_128(), 0, 0
    with folder.open_output(name) as stream:

        def end_piece(began: float) -> float:
            if folder.is_local:
                os.fdatasync(stream.fileno())
            rest(time.monotonic() - began)
            return time.monotonic()

        began = time.monotonic()
        for chunk in chunks:
            digest.update(chunk)
            stream.write(chunk)
            written += len(chunk)
            if written - synced >= PIECE_BYTES:
                began, synced = end_piece(began), written
        if written > synced:
            end_piece(began)
    return FileRecord(bytes=written, digest=digest.hexdigest())


def _chunks(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))


def cast_vote(folder: Folder, save: Save, vote: Vote) -> Vote:
    """Leave a rank's vote beside its file. An empty file is a bad vote: it finds its place on the fullest disk."""
    try:
        folder.write_bytes(vote_file(save.rank, save.world_size), vote.model_dump_json().encode())
    except OSError as error:
        vote = Vote(save=save.id, error=vote.error or f"its vote: {error}")
        if folder.is_local:
            (folder.path / last_word_file(save)).touch()
    return vote


def commit(
    folder: Folder,
    own: Vote,
    world_size: int,
    state: CheckpointState,
    history: str = "[]",
    sign: Callable[[], object] = bool,
) -> int:
    """Rank 0: wait for every vote, then write manifest and marker. Returns the bytes of all files.

    Args:
        own: rank 0's vote.
        history: events of the last steps, as JSON.
        sign: called while votes are waited for.

    Raises:
        OSError: where a rank could not write, its vote did not come, or the disk is full; nothing is committed then.
    """
    files = _gather_votes(folder, own, world_size, sign)
    files[HISTORY] = _write(folder, HISTORY, history)
    files[STATE] = _write(folder, STATE, state.model_dump_json(indent=1))
    digest = _write(folder, MANIFEST, CheckpointManifest(files=files).model_dump_json(indent=1)).digest
    folder.write_bytes(COMMITTED, digest.encode())
    return sum(file.bytes for file in files.values())


def _write(folder: Folder, name: str, text: str) -> FileRecord:
    data = text.encode()
    folder.write_bytes(name, data)
    return FileRecord(bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))


def _gather_votes(folder: Folder, own: Vote, world_size: int, sign: Callable[[], object]) -> dict[str, FileRecord]:
    """Every rank's file. Waits for all votes, so that nobody is still writing when this raises."""
    deadline = time.monotonic() + (VOTE_TIMEOUT_S if own.file else BLIND_TIMEOUT_S)
    votes: dict[int, Vote | None] = {0: own}
    refreshed = time.monotonic()
    for rank in range(1, world_size):
        save = Save(id=own.save, rank=rank, world_size=world_size)
        while (vote := read_vote(folder, save)) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            if time.monotonic() - refreshed > REFRESH_S:
                retrying(folder.refresh, f"looking at {folder}")
                sign()
                refreshed = time.monotonic()
        votes[rank] = vote
    bad = {rank: vote.error if vote else "no vote came" for rank, vote in votes.items() if not vote or not vote.file}
    if bad:
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in bad.items())
        raise OSError(f"{folder.name} is not committed: {reasons}")
    return {rank_file(rank, world_size): vote.file for rank, vote in votes.items() if vote and vote.file}


def read_vote(folder: Folder, save: Save) -> Vote | None:
    """A rank's vote in a save, if it has cast one. Asked by listing: who opens what is absent sees it late."""
    names, name = retrying(folder.list, f"listing {folder}"), vote_file(save.rank, save.world_size)
    if name in names:
        with contextlib.suppress(FileNotFoundError, ValueError):  # replaced at this moment, or seen before its end
            vote = Vote.model_validate_json(retrying(lambda: folder.read_bytes(name), f"reading {name} of {folder}"))
            if vote.save == save.id:
                return vote
    if last_word_file(save) in names:
        return Vote(save=save.id, error="its disk was too full to say why it failed")
    return None
