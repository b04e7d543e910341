"""The records and file names of a checkpoint's folder, and what a rank and its writer process tell each other."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.records import Record

if TYPE_CHECKING:  # a writer process, which needs none, would make the model of each kind of event
    from trainers.run.events import StepEvent

COMMITTED, MANIFEST, STATE, HISTORY = "COMMITTED", "manifest.json", "state.json", "history.json"
QUARANTINED = "QUARANTINED"


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


class Save(Record):
    """One rank's part in one save."""

    id: str
    """Names the launch and the save within it; the same on every rank."""
    rank: int
    world_size: int


class Vote(Record):
    """A rank's word that its file is whole, or why it is not."""

    save: str
    file: FileRecord | None = None
    error: str | None = None


class SaveRequest(Record):
    """What a rank asks of its writer process."""

    save: Save
    step: int
    folder: str
    """Where the checkpoint goes, as `Folder` spells it."""
    total_bytes: int
    """Size of all ranks' files."""
    state: CheckpointState | None = None
    """On rank 0, whose writer commits."""
    history: str = "[]"
    """Events of the last steps, as JSON."""
    settle_s: float = 0.0
    """How long to wait before writing, while other ranks of the machine copy: both need the memory's bandwidth."""
    rest: float = 0.0
    """Sleep after each 32 MiB as a multiple of its write time; ignored once the rank blocks on the save."""
    written: Vote | None = None
    """The vote over a file that the rank wrote itself; it is cast, and nothing more is written."""
    refusal: str | None = None
    """Why this rank has nothing to write, which is then its vote."""


class SaveReport(Record):
    """What became of a request: for rank 0 the commit, for the others their own file."""

    step: int
    error: str | None = None
    bytes: int = 0
    at: float = 0.0
    """When, by the machine's monotonic clock."""


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def vote_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def last_word_file(save: Save) -> str:
    """Name of the empty file that stands for a bad vote where there is no room to write one."""
    return f"rank-{save.rank:05d}-of-{save.world_size:05d}.{save.id}.failed"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    tokens: int
    history: "tuple[StepEvent, ...]" = ()
    """The last steps' events. They go into each checkpoint, because a controller that is killed may not have heard of
    steps whose checkpoint is committed."""
