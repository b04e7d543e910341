"""What a rank server is told of a new rank, and where a rank's files lie. Imports no torch: node agents read it too."""

from pathlib import Path
from typing import Literal

from trainers.records import Record
from trainers.run.record import Run

Mode = Literal["fork", "become"]


class RankSpec(Record):
    """All that a new rank is told, as one line of JSON."""

    environment: dict[str, str]
    """The launcher contract, and the interfaces collectives go through."""
    files: str
    """Folder of this host for the rank's heartbeat, events and stacks."""
    log: str | None
    """File that standard output and error are appended to; None leaves them."""
    run: Run


def heartbeat_file(files: Path) -> Path:
    """Where a rank's heartbeat page is."""
    return files / "heartbeat"


def events_file(files: Path) -> Path:
    """The named pipe a rank's events leave by."""
    return files / "events"


def stacks_file(files: Path) -> Path:
    """Where a rank's stacks go on SIGUSR1."""
    return files / "stacks"
