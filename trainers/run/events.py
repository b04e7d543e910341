"""The events of a run, one frozen record a kind, and events.jsonl, which holds them one a line. Torch-free.

Ranks and the controller make them, `trainers/run/log.py` appends them, everything that shows a run reads them. The file
outlives versions of this program: fields that a record does not know are passed over, those that lack have a default,
lines that are no event (cut off, or being written) are left out. Of a step that was repeated the later event counts.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainers.records import StopReason
from trainers.storage import Folder

EVENTS = "events.jsonl"
HEAD_BYTES, TAIL_BYTES = 1 << 14, 1 << 18


class BaseEvent(BaseModel):
    """What every event has."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    kind: str
    time: float = Field(default_factory=time.time)
    """Wall clock of the process where it happened."""

    def values(self) -> dict[str, Any]:
        """Its fields without kind and time, as they stand in events.jsonl."""
        return self.model_dump(mode="json", exclude={"kind", "time"})


class StageStartEvent(BaseEvent):
    """A stage of the controller begins: shard, train, evaluate, register."""

    kind: Literal["stage_start"] = "stage_start"
    stage: str


class StageEvent(BaseEvent):
    """A stage has ended, also by an exception."""

    kind: Literal["stage"] = "stage"
    stage: str
    seconds: float


class VerificationEvent(BaseEvent):
    """The self-tests before the first launch have ended."""

    kind: Literal["verification"] = "verification"
    passed: int
    failed: tuple[str, ...]
    key: str = ""
    seconds: float = 0.0


class StartEvent(BaseEvent):
    """The ranks are ready for their first step of this launch."""

    kind: Literal["start"] = "start"
    step: int
    """Steps done before this launch."""
    steps: int | None = None
    """Steps of the whole run."""
    world_size: int = 1
    checkpoint_bytes: int = 0
    deepspeed: str | None = None
    """How the state is kept: a template's name or path."""
    micro_batch_size: int | None = None
    checkpoint_every_layers: int | None = None
    """Of so many layers one is computed again in the backward pass; 0: none."""
    feed_forward_tiles: bool = False


class StepEvent(BaseEvent):
    """One optimizer step is done."""

    kind: Literal["step"] = "step"
    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int = 0
    """Trained on since the beginning of the run."""
    tokens_per_s: float | None = None
    step_s: float = 0.0
    data_wait_s: float = 0.0
    memory_gib: float | None = None


class ProfileEvent(BaseEvent):
    """Where the time of a few steps, up to `step`, went on rank 0. Of a step: seconds, for which the GPU computed, and
    how often the host waited for it; None on a CPU. mfu: share of the peak, at 6 operations a parameter and token."""

    kind: Literal["profile"] = "profile"
    step: int
    step_s: float
    busy_s: float | None = None
    waits: int | None = None
    tokens_per_s: float = 0.0
    mfu: float | None = None
    operators: tuple[tuple[str, float, int], ...] = ()
    """Name, seconds (of the GPU where there is one) and calls a step."""
    trace: str = ""


class HistoryEvent(BaseEvent):
    """Steps before a resumed checkpoint; the log takes those it never heard of, and keeps no record of the rest."""

    kind: Literal["history"] = "history"
    events: tuple[StepEvent, ...]


class StragglerEvent(BaseEvent):
    """The other ranks wait for this one."""

    kind: Literal["straggler"] = "straggler"
    step: int
    rank: int
    lag_s: float
    """Seconds a step that it computes longer than the rank that computes least."""


class CheckpointEvent(BaseEvent):
    """A checkpoint is committed; later steps may precede this event, `step` says whose it is."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    wait_s: float = 0.0
    """Waited for the save before it."""
    blocked_s: float = 0.0
    """How long the loop stood still for the copy."""
    copy_s: float = 0.0
    seconds: float = 0.0
    """From its begin to its commit."""
    bytes: int = 0


class CheckpointSkippedEvent(BaseEvent):
    """A save came to nothing."""

    kind: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    step: int
    reason: str


class CheckpointQuarantinedEvent(BaseEvent):
    """A committed checkpoint contradicts its digests and was set aside."""

    kind: Literal["checkpoint_quarantined"] = "checkpoint_quarantined"
    step: int
    reason: str


class RolledBackEvent(BaseEvent):
    """The loss diverged at this step (counted from 1): back to the last commit, without the step's rows."""

    kind: Literal["rolled_back"] = "rolled_back"
    step: int
    reason: str


class DoneEvent(BaseEvent):
    """Every rank left the loop."""

    kind: Literal["done"] = "done"
    step: int
    tokens: int = 0
    stopped: StopReason | None = None
    """None where every step is done."""
    device_gib: tuple[float, ...] = ()
    host_gib: tuple[float, ...] = ()
    """Peak memory of each rank: of its tensors on the GPU (none on CPUs), and resident of its process."""


class RefusedEvent(BaseEvent):
    """A rank ends the run with a message for the user."""

    kind: Literal["refused"] = "refused"
    error: dict[str, Any]
    """As `trainers.errors.to_record` gives it."""
    rank: int | None = None


class FailedEvent(BaseEvent):
    """A rank raised; not kept in the log, where the restart names the cause. `error` as in `RefusedEvent`."""

    kind: Literal["failed"] = "failed"
    error: dict[str, Any]
    errno: int | None = None
    where: str = ""
    may_pass: bool = False
    """Whether storage or memory is behind it; else the same would come again."""


class HangEvent(BaseEvent):
    """No rank has moved for too long; this one holds up the others. `report` tells where every rank stands."""

    kind: Literal["hang"] = "hang"
    rank: int
    step: int
    phase: str
    line: str
    report: str


class RestartEvent(BaseEvent):
    """A launch failed; the ranks are started again unless the restarts are used up."""

    kind: Literal["restart"] = "restart"
    cause: str = ""
    lost_nodes: tuple[str, ...] = ()
    failures: int = 1
    """Failures in a row without a new checkpoint."""


class EvaluationEvent(BaseEvent):
    """The evaluation of a checkpoint has ended."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    status: Literal["done", "failed"] = "done"
    metrics: dict[str, float] = {}
    error: str | None = None
    held_s: float = 0.0
    """Seconds that the ranks stood still for it; 0 where it ran beside them."""


class GoodputEvent(BaseEvent):
    """Seconds of the run so far by what they went into, a field each; see `trainers/run/goodput.py`."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["goodput"] = "goodput"
    step: int
    share: float


Event = (
    StageStartEvent
    | StageEvent
    | VerificationEvent
    | StartEvent
    | StepEvent
    | HistoryEvent
    | ProfileEvent
    | StragglerEvent
    | CheckpointEvent
    | CheckpointSkippedEvent
    | CheckpointQuarantinedEvent
    | RolledBackEvent
    | DoneEvent
    | RefusedEvent
    | FailedEvent
    | HangEvent
    | RestartEvent
    | EvaluationEvent
    | GoodputEvent
)
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def parse_events(lines: Iterable[bytes]) -> list[Event]:
    """The events among some lines, in order."""
    events = []
    for line in lines:
        with suppress(ValidationError):
            events.append(_ADAPTER.validate_json(line))
    return events


def read_events(run: Folder) -> list[Event]:
    """Every event of a run, oldest first."""
    with suppress(FileNotFoundError):
        return parse_events(run.read_bytes(EVENTS).splitlines())
    return []


def outer_events(run: Folder) -> list[Event]:
    """The first and the last events of a run, in order: a long log without what lies between."""
    try:
        size = run.size(EVENTS)
        with run.open_input(EVENTS) as stream:
            if size <= HEAD_BYTES + TAIL_BYTES:
                return parse_events(bytes(stream.read(size)).split(b"\n"))
            head = bytes(stream.read(HEAD_BYTES)).split(b"\n")[:-1]
            stream.seek(size - TAIL_BYTES)
            return parse_events(head + bytes(stream.read(TAIL_BYTES)).split(b"\n")[1:])
    except FileNotFoundError:
        return []


def steps_of(events: Sequence[Event]) -> list[StepEvent]:
    """The step events, one a step, in order of the step."""
    by_step = {event.step: event for event in events if isinstance(event, StepEvent)}
    return [by_step[step] for step in sorted(by_step)]
