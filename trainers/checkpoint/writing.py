"""Puts a checkpoint on storage and commits it: rank files, then each rank's vote, then the manifest, then COMMITTED.

No collective waits for a disk: a rank writes its file and its vote and goes on; rank 0 watches storage for the votes.
A vote carries the attempt that wrote it, so leftovers of a killed attempt are never taken for this one's.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from trainers.checkpoint.slices import RankState
from trainers.checkpoint.tensor_file import spec_of, write_tensors
from trainers.data.manifest import Record
from trainers.storage import Folder

COMMITTED, MANIFEST, STATE, HISTORY = "COMMITTED", "manifest.json", "state.json", "history.json"
Event = dict[str, Any]
VOTE_TIMEOUT_S = 600.0
POLL_S = 0.02


class CheckpointState(Record):
    """state.json: what a checkpoint holds, apart from the numbers."""

    schema_version: int = 1
    step: int
    """Optimizer steps done; training goes on with step number `step`, counted from 0."""
    world_size: int
    zero_stage: int
    shapes: dict[str, list[int]]
    """Full shape of each parameter."""
    trainable: tuple[str, ...]
    tokens: int
    """Tokens trained on so far."""
    train_key: str
    """Key of the training shards, which with the step gives the position in the data."""
    job: str
    """Identity of the job."""


class FileRecord(Record):
    """One file of a checkpoint."""

    bytes: int
    digest: str
    """xxh3-128."""


class CheckpointManifest(Record):
    """manifest.json: every file that belongs to the checkpoint."""

    files: dict[str, FileRecord]


class Vote(Record):
    """A rank's word that its file is whole, or why it is not."""

    attempt: str
    file: FileRecord | None = None
    error: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One launch of the ranks."""

    id: str
    rank: int
    world_size: int


def rank_file(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def vote_file(rank: int, world_size: int) -> str:
    """Name of a rank's vote."""
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def write_rank(folder: Folder, attempt: Attempt, state: RankState) -> None:
    """Write this rank's file, then its vote. A failure to write becomes the vote."""
    name = rank_file(attempt.rank, attempt.world_size)
    specs = [spec_of(key, tensor) for key, tensor in state.tensors.items()]
    metadata = {"starts": json.dumps(state.starts)}
    try:
        with folder.open_output(name) as stream:
            digest = write_tensors(stream, specs, state.tensors.__getitem__, metadata)
        vote = Vote(attempt=attempt.id, file=FileRecord(bytes=digest.bytes, digest=digest.digest))
    except OSError as error:
        vote = Vote(attempt=attempt.id, error=f"{type(error).__name__}: {error}")
    folder.write_bytes(vote_file(attempt.rank, attempt.world_size), vote.model_dump_json().encode())


def commit(folder: Folder, attempt: Attempt, state: CheckpointState, history: Sequence[Event] = ()) -> None:
    """Rank 0: wait for every vote, then write manifest and marker.

    Args:
        history: events of the last steps.

    Raises:
        OSError: where a rank could not write, its vote did not come, or the disk is full; nothing is committed then.
    """
    files = _gather_votes(folder, attempt)
    files[HISTORY] = _write(folder, HISTORY, json.dumps(list(history)))
    files[STATE] = _write(folder, STATE, state.model_dump_json(indent=1))
    digest = _write(folder, MANIFEST, CheckpointManifest(files=files).model_dump_json(indent=1)).digest
    folder.write_bytes(COMMITTED, digest.encode())


def _write(folder: Folder, name: str, text: str) -> FileRecord:
    data = text.encode()
    folder.write_bytes(name, data)
    return FileRecord(bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))


def _gather_votes(folder: Folder, attempt: Attempt) -> dict[str, FileRecord]:
    """Every rank's file. Waits for all votes, so that nobody is still writing when this raises."""
    deadline = time.monotonic() + VOTE_TIMEOUT_S
    votes = {rank: _await_vote(folder, attempt, rank, deadline) for rank in range(attempt.world_size)}
    bad = {rank: vote.error if vote else "no vote came" for rank, vote in votes.items() if not vote or not vote.file}
    if bad:
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in bad.items())
        raise OSError(f"{folder.name} is not committed: {reasons}")
    return {rank_file(rank, attempt.world_size): vote.file for rank, vote in votes.items() if vote and vote.file}


def _await_vote(folder: Folder, attempt: Attempt, rank: int, deadline: float) -> Vote | None:
    while time.monotonic() < deadline:
        try:
            vote = Vote.model_validate_json(folder.read_bytes(vote_file(rank, attempt.world_size)))
        except FileNotFoundError:
            vote = None
        if vote is not None and vote.attempt == attempt.id:
            return vote
        time.sleep(POLL_S)
    return None


def clean_uncommitted(checkpoints: Folder) -> list[str]:
    """Remove what killed attempts left: step folders without COMMITTED. Returns their names."""
    left = [
        name for name in checkpoints.list() if name.startswith("step-") and not (checkpoints / name).exists(COMMITTED)
    ]
    for name in left:
        checkpoints.delete(name)
    return left


def state_record(engine: Any, step: int, tokens: int, train_key: str, job: str) -> CheckpointState:
    """What rank 0 writes down beside the numbers."""
    from trainers.checkpoint.slices import parameter_shapes, stage_of

    return CheckpointState(
        step=step,
        world_size=engine.world_size,
        zero_stage=stage_of(engine),
        shapes=parameter_shapes(engine),
        trainable=tuple(name for name, p in engine.module.named_parameters() if p.requires_grad),
        tokens=tokens,
        train_key=train_key,
        job=job,
    )
