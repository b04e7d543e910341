"""What the controller has heard from a training, and how one ends: the records of
`orchestrator.training.controller`."""

from dataclasses import dataclass, field
from typing import Any

from trainers.checkpoint.reading import committed_steps
from trainers.run.folder import Evaluation
from trainers.run.log import read_events
from trainers.storage import Folder

Event = dict[str, Any]
GOES_ON = ("preempted", "resize")
"""Reasons to stop after which the training is not over."""


@dataclass(frozen=True)
class TrainOutcome:
    """What the training stage leaves behind, beside the checkpoints."""

    steps: int
    tokens: int
    restarts: int


@dataclass
class Watch:
    """What the controller has heard from the ranks so far."""

    starts: int = 0
    tokens: int = 0
    step_times: list[float] = field(default_factory=list)
    """Seconds of the steps of this launch."""
    commits: int = 0
    done: Event | None = None
    refused: Event | None = None

    def note(self, event: Event) -> None:
        """Take in one event."""
        if event["kind"] == "start":
            self.starts += 1
            self.step_times.clear()
        elif event["kind"] == "step":
            self.step_times.append(event["step_s"])
            self.tokens = event["tokens"]
        elif event["kind"] == "checkpoint":
            self.commits += 1
        elif event["kind"] == "done":
            self.done = event
        elif event["kind"] == "refused":
            self.refused = self.refused or event


@dataclass(frozen=True)
class Failure:
    """Ranks that ended, or hung, before their last step."""

    cause: str
    lost_nodes: tuple[str, ...] = ()


def finished_training(run: Folder, checkpoints: Folder) -> Event | None:
    """The event that ended this run's training for good, if its last checkpoint is there."""
    ends = [event for event in read_events(run) if event["kind"] == "done" and event["stopped"] not in GOES_ON]
    return ends[-1] if ends and ends[-1]["step"] in committed_steps(checkpoints) else None


def record_event(record: Evaluation) -> Event:
    """An evaluation as an event of the run's log."""
    return {
        "kind": "evaluation",
        "step": record.step,
        "status": record.status,
        "metrics": record.metrics,
        "error": record.error,
    }
