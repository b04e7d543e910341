"""The state of runs, read from their folders: nothing is asked of Ray, so it works when everything else is down.

A driver holds an flock on `driver.lock` while it lives; where no lock can be seen (remote storage, a run under
torchrun) the age of the last event tells whether a run still goes on.
"""

import difflib
import fcntl
import math
import time
from collections.abc import Sequence
from typing import Literal

import yaml

from orchestrator.terminal.table import show
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.evaluation.selection import find_best
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.events import EVENTS, StartEvent, outer_events, steps_of
from trainers.run.folder import RESULT, RunResult, checkpoints_folder, read_evaluations, read_result
from trainers.storage import Folder
from trainers.tasks import choose_metric

LOCK = "driver.lock"
QUIET_S = 180.0
"""Without a lock to look at, a run whose last event is older than this counts as interrupted."""

State = Literal["running", "done", "failed", "preempted", "interrupted"]


class RunStatus(Record):
    """One run, as `tuneyard status` shows it."""

    run: str
    """Name of the run folder."""
    folder: str
    state: State
    error: str | None = None
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


def run_status(storage: Folder, run: str | None = None) -> list[RunStatus]:
    """State of the runs of a storage, the most recently active first.

    Args:
        storage: as in the job file.
        run: only this run: its folder's name, the start of it, or its path.

    Raises:
        JobError: where no run has that name.
    """
    if run is not None and "/" in run and Folder(run).exists("job.yaml"):
        return [_status(Folder(run.rstrip("/")))]
    runs = storage / "runs"
    names = runs.list()
    chosen = names if run is None else _choose(names, run, runs)
    found = [_status(runs / name) for name in chosen if (runs / name).list()]
    return sorted(found, key=lambda one: math.inf if one.event_age_s is None else one.event_age_s)


def headline(one: RunStatus) -> dict[str, str]:
    """The fields worth a column on a terminal, as texts."""
    age = "" if one.event_age_s is None else f"{one.event_age_s:,.0f} s ago"
    best = "" if one.best_value is None else f"{one.metric} {one.best_value:.4f} at {one.best_step}"
    return {
        "run": one.run,
        "state": one.state,
        "step": f"{one.step} of {one.steps}" if one.steps else str(one.step),
        "checkpoint": "" if one.last_checkpoint is None else str(one.last_checkpoint),
        "best": best,
        "loss": "" if one.loss is None else f"{one.loss:.4f}",
        "tokens/s": "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
        "last event": age,
        "registered": one.registered or "",
    }


def _choose(names: list[str], wanted: str, runs: Folder) -> list[str]:
    wanted = wanted.rstrip("/").rpartition("/")[2]
    chosen = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if not chosen:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:5]
        raise JobError(f"no run {wanted!r} in {runs}; " + (f"there are: {', '.join(near)}" if near else "it is empty"))
    return chosen


def _status(run: Folder) -> RunStatus:
    events, job, problem = outer_events(run), _job(run), None
    try:
        result = read_result(run)
    except ValueError as error:
        result, problem = None, f"{RESULT} is damaged: {str(error).splitlines()[0]}"
    age = max(0.0, time.time() - events[-1].time) if events else None
    state = _state(run, result, age)
    last = next(iter(steps_of(events)[-1:]), None)
    planned = [event.steps for event in events if isinstance(event, StartEvent) and event.steps]
    committed = committed_steps(checkpoints_folder(job, run) if job else run / "checkpoints")
    metric = choose_metric(job) if job else None
    best = find_best(read_evaluations(run), *metric) if metric else None
    return RunStatus(
        run=run.name,
        folder=str(run),
        state=state,
        error=problem or (result.error if result and state == result.status else None),
        step=last.step if last else 0,
        steps=planned[-1] if planned else job.train.steps if job else None,
        last_checkpoint=committed[-1] if committed else None,
        metric=metric[0] if metric else None,
        best_step=best.step if best else None,
        best_value=best.metrics[metric[0]] if best and metric else None,
        loss=last.loss if last else None,
        tokens_per_s=last.tokens_per_s if last else None,
        event_age_s=age,
        registered=f"{result.registry.model} version {result.registry.version}" if result and result.registry else None,
    )


def _state(run: Folder, result: RunResult | None, age_s: float | None) -> State:
    held = lock_is_held(run)
    if held:
        return "running"
    if result is not None and (result.status == "done" or not _went_on(run)):
        return result.status
    if held is None and age_s is not None and age_s < QUIET_S:
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
    return False


def _job(run: Folder) -> Job | None:
    """The resolved job, None where it is not written yet or of another version of this program."""
    if not run.exists("job.yaml"):
        return None
    try:
        raw = yaml.safe_load(run.read_bytes("job.yaml"))
        return parse_job(raw) if isinstance(raw, dict) else None
    except (yaml.YAMLError, JobError):
        return None


def status_table(found: Sequence[RunStatus]) -> None:
    """One line a run."""
    lines = [headline(one) for one in found]
    show("runs", list(lines[0]) if lines else ("no runs yet",), [list(line.values()) for line in lines])
