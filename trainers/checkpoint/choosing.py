"""Which checkpoint the ranks go on from: rank 0 decides, all follow. Begin at `choose_checkpoint`.

Shared storage is no way to tell each other things: two hosts may see it in two states for a minute. Rank 0 lists and
broadcasts; every rank checks its share of the files against what was broadcast, and waits for what it does not see yet.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trainers.checkpoint.cleaning import clean_leftovers, quarantine, quarantined
from trainers.checkpoint.damage import Damaged, Finding, check_files, compare, read_manifest
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import CheckpointManifest
from trainers.errors import TrainingError
from trainers.run.events import CheckpointQuarantinedEvent, Event
from trainers.run.folder import step_name
from trainers.storage import Folder

T = TypeVar("T")
Emit = Callable[[Event], None]


class Ranks(Protocol):
    """What the choice needs of a world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value by rank, on every rank."""


@dataclass(frozen=True)
class Proposal:
    """What rank 0 tells the others: a step and its manifest, or why there is none."""

    step: int = 0
    manifest: CheckpointManifest | None = None
    error: Exception | None = None


def choose_checkpoint(checkpoints: Folder, ranks: Ranks, emit: Emit, start_over: bool = False) -> (
    CheckpointReader | None
):  # fmt: skip
    """The newest committed checkpoint that is whole, the same on every rank; None where there is none.

    Args:
        emit: called on rank 0.
        start_over: begin at step 0 also where checkpoints were set aside and none is left.

    Raises:
        OSError: where a rank cannot read it, or does not see it in time. Nothing is set aside for that.
        TrainingError: where every checkpoint is damaged.
    """
    while True:
        proposal = ranks.broadcast(_propose(checkpoints, emit, start_over) if ranks.rank == 0 else Proposal())
        if proposal.error:
            raise proposal.error
        if proposal.manifest is None:
            return None
        files = LocalCopies(checkpoints / step_name(proposal.step))
        finding = check_files(files, proposal.manifest, slice(ranks.rank, None, ranks.size))
        findings = ranks.gather((socket.gethostname(), finding))
        verdict = ranks.broadcast(_judge(files, proposal.manifest, findings) if ranks.rank == 0 else None)
        if isinstance(verdict, OSError):
            raise verdict
        if verdict is None:
            return CheckpointReader(files, proposal.manifest)
        if ranks.rank == 0:
            _set_aside(checkpoints, proposal.step, verdict, emit)


def _propose(checkpoints: Folder, emit: Emit, start_over: bool) -> Proposal:
    """Rank 0: the newest step with a manifest that its marker confirms."""
    try:
        for event in clean_leftovers(checkpoints):
            emit(event)
        for step in reversed(committed_steps(checkpoints)):
            try:
                return Proposal(step, read_manifest(checkpoints / step_name(step)))
            except Damaged as damaged:
                _set_aside(checkpoints, step, str(damaged), emit)
        aside = quarantined(checkpoints)
    except OSError as error:
        return Proposal(error=error)
    if aside and not start_over:
        return Proposal(error=TrainingError(
            f"every checkpoint in {checkpoints} is damaged and was set aside ({', '.join(aside)}; the reason stands in "
            "each, in QUARANTINED), so training would begin at step 0: put one back from a copy, or say "
            "checkpoint.start_over=true"
        ))  # fmt: skip
    return Proposal()


def _judge(
    files: LocalCopies, manifest: CheckpointManifest, findings: Sequence[tuple[str, Finding | None]]
) -> str | OSError | None:
    """Rank 0's verdict: what is damaged, or the error of a rank that cannot read or see what rank 0 can.

    A damage that one rank reports counts once rank 0 has read that file anew and finds it too.
    """
    errors: list[OSError] = []
    for rank, (host, finding) in enumerate(findings):
        if finding is None:
            continue
        where = f"rank {rank} on {host}, {files.folder}"
        if finding.error:
            errors.append(OSError(finding.error.errno, f"{where}: {finding.error.strerror or finding.error}"))
            continue
        files.forget(finding.file)
        try:
            damage = compare(files, finding.file, manifest.files[finding.file])
        except OSError as error:
            errors.append(error)
            continue
        if damage:
            return damage
        errors.append(OSError(f"{where}: {finding.damage}, but rank 0 on {findings[0][0]} sees it whole"))
    return errors[0] if errors else None


def _set_aside(checkpoints: Folder, step: int, reason: str, emit: Emit) -> None:
    quarantine(checkpoints, step, reason)
    emit(CheckpointQuarantinedEvent(step=step, reason=reason))
