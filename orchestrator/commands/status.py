"""The state of runs, read from their folders: nothing is asked of Ray, so it works when everything else is down.

A driver holds an flock on `driver.lock` while it lives; where no lock can be seen (remote storage, a run under
torchrun) the age of the last event tells whether a run still goes on.
"""

import fcntl
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Literal

import yaml

from orchestrator.commands.find_run import JOB_FILE, choose_names, find_folder, job_file_of, run_names, runs_folder
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.evaluation.selection import find_best
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.events import (
    EVENTS,
    DoneEvent,
    Event,
    RestartEvent,
    RolledBackEvent,
    StageStartEvent,
    StartEvent,
    StepEvent,
    outer_events,
    steps_of,
)
from trainers.run.folder import RESULT, RunResult, checkpoints_folder, read_evaluations, read_result
from trainers.run.lock import LOCK, UNKNOWN
from trainers.storage import Folder, is_remote
from trainers.tasks import choose_metric

QUIET_S = 180.0
"""Without a lock to look at, a run whose last event is older than this counts as interrupted."""

PACE_STEPS = 50
"""Steps whose median pace gives the time left."""

STAGES = {
    "shard": "writing shards",
    "train": "starting the workers: loading, self-tests",
    "evaluate": "evaluating",
    "register": "registering",
}
"""What a stage of the controller does before anything else is told of it."""

State = Literal["running", "trained", "done", "failed", "preempted", "paused", "interrupted"]
"""paused: by its sweep, at a committed step. trained: every step is done and committed, but the run is not evaluated
and registered: `tuneyard run` goes on."""


class RunStatus(Record):
    """One run, as `tuneyard status` shows it."""

    run: str
    """Name of the run folder."""
    folder: str
    state: State
    error: str | None = None
    doing: str | None = None
    """What a running run does between its steps."""
    step: int = 0
    """Last optimizer step that was taken."""
    steps: int | None = None
    """Steps planned, None where that is not known yet."""
    last_checkpoint: int | None = None
    """Step of the newest committed checkpoint."""
    metric: str | None = None
    best_step: int | None = None
    best_value: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    event_age_s: float | None = None
    """Seconds since the last event."""
    registered: str | None = None
    """Model and version, once registered."""
    left_s: float | None = None
    """Seconds to the last step at the present pace, while the run trains."""
    restarts: int = 0
    """Restarts and rollbacks among the events that were read: the first and the last of a long run."""
    last_restart: str | None = None
    """Its cause."""
    last_restart_age_s: float | None = None
    logs: str | None = None
    """Folder with the output of each rank."""


def run_status(storage: Folder, run: str | None = None) -> list[RunStatus]:
    """State of the runs of a storage, the most recently active first.

    Args:
        storage: as in the job file.
        run: only this run: a job file, a run's name, the start of one, or its folder.

    Raises:
        JobError: no such folder, job file or run.
    """
    if run is not None and (job_file_of(run) or is_remote(run) or "/" in run.rstrip("/")):
        return [_status(find_folder(run))]
    runs = runs_folder(str(storage))
    names = run_names(runs) if run is None else choose_names(run.rstrip("/"), runs)
    found = [_status(runs / name) for name in names if {JOB_FILE, EVENTS, LOCK} & set((runs / name).list())]
    return sorted(found, key=lambda status: math.inf if status.event_age_s is None else status.event_age_s)


def _status(run: Folder) -> RunStatus:
    events, job, problem = outer_events(run), _job(run), None
    try:
        result = read_result(run)
    except ValueError as error:
        result, problem = None, f"{RESULT} is damaged: {str(error).splitlines()[0]}"
    age = max(0.0, time.time() - events[-1].time) if events else None
    state = _state(run, result, age, events)
    last = next(iter(steps_of(events)[-1:]), None)
    planned = [event.steps for event in events if isinstance(event, StartEvent) and event.steps]
    committed = committed_steps(checkpoints_folder(job, run) if job else run / "checkpoints")
    restarts = [event for event in events if isinstance(event, RestartEvent | RolledBackEvent)]
    steps = planned[-1] if planned else job.train.steps if job else None
    metric = choose_metric(job) if job else None
    best = find_best(read_evaluations(run), *metric) if metric else None
    return RunStatus(
        run=run.name,
        folder=str(run),
        state=state,
        error=problem or (result.error if result and state == result.status else None),
        doing=_doing(events) if state == "running" else None,
        step=last.step if last else 0,
        steps=steps,
        last_checkpoint=committed[-1] if committed else None,
        metric=metric[0] if metric else None,
        best_step=best.step if best else None,
        best_value=best.metrics[metric[0]] if best and metric else None,
        loss=last.loss if last else None,
        tokens_per_s=last.tokens_per_s if last else None,
        event_age_s=age,
        registered=f"{result.registry.model} version {result.registry.version}" if result and result.registry else None,
        left_s=time_left_s(events, steps) if state == "running" else None,
        restarts=len(restarts),
        last_restart=_cause(restarts[-1]) if restarts else None,
        last_restart_age_s=max(0.0, time.time() - restarts[-1].time) if restarts else None,
        logs=str(run / "logs") if (run / "logs").exists() else None,
    )


def _doing(events: Sequence[Event]) -> str | None:
    """The stage that has begun, where no step came since."""
    for event in reversed(events):
        if isinstance(event, StageStartEvent):
            return STAGES.get(event.stage)
        if isinstance(event, StepEvent):
            return None
    return None


def _cause(event: RestartEvent | RolledBackEvent) -> str:
    return event.cause if isinstance(event, RestartEvent) else f"step {event.step} diverged: {event.reason}"


def time_left_s(events: Sequence[Event], steps: int | None) -> float | None:
    """Seconds to the last step, from the median time between the last steps of this launch, saves included."""
    times: list[float] = []
    last = 0
    for event in events:
        if isinstance(event, StartEvent):
            times = []
        elif isinstance(event, StepEvent):
            times, last = [*times[-PACE_STEPS:], event.time], event.step
    if steps is None or len(times) < 2:
        return None
    pace = statistics.median(after - before for before, after in itertools.pairwise(times))
    return max(steps - last, 0) * max(pace, 0.0)


def _state(run: Folder, result: RunResult | None, age_s: float | None, events: Sequence[Event]) -> State:
    locked = lock_is_held(run)
    if locked:
        return "running"
    if result is not None and (result.status == "done" or not _went_on(run)):
        return result.status
    ends = [event for event in events if isinstance(event, StartEvent | StepEvent | DoneEvent)][-1:]
    if ends and isinstance(ends[0], DoneEvent) and ends[0].stopped != "resize":
        return ends[0].stopped if ends[0].stopped in ("preempted", "paused") else "trained"
    if locked is None and age_s is not None and age_s < QUIET_S:
        return "running"
    return "interrupted"


def _went_on(run: Folder) -> bool:
    """Whether the run was started again after its result was written: events that are newer, by a margin."""
    if not run.is_local or not run.exists(EVENTS):
        return False
    return (run.path / EVENTS).stat().st_mtime > (run.path / RESULT).stat().st_mtime + 5


def lock_is_held(run: Folder) -> bool | None:
    """Whether a driver of this run lives; None where no lock can tell."""
    if not run.is_local:
        return None
    try:
        with (run.path / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        return None
    return False


def _job(run: Folder) -> Job | None:
    """The resolved job, None where it is not written yet or of another version of this program."""
    if not run.exists(JOB_FILE):
        return None
    try:
        raw = yaml.safe_load(run.read_bytes(JOB_FILE))
        return parse_job(raw) if isinstance(raw, dict) else None
    except (yaml.YAMLError, JobError):
        return None
