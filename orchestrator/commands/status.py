"""The state of runs, read from their folders: nothing is asked of Ray, so it works when everything else is down.

A driver holds an flock on `driver.lock` while it lives; where no lock can be seen (remote storage, a run under
torchrun) the age of the last event tells whether a run still goes on.
"""

import difflib
import fcntl
import math
import time
from typing import Any, Literal

import yaml

from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.records import Event, Record
from trainers.run.events import outer_events, steps_of
from trainers.run.folder import Evaluation, RunResult, checkpoints_folder, parse_step
from trainers.run.log import EVENTS
from trainers.storage import Folder
from trainers.tasks import load_task

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
    events = outer_events(run)
    age = max(0.0, time.time() - float(events[-1]["time"])) if events and "time" in events[-1] else None
    result, problem = _result(run)
    last = next(iter(steps_of(events)[-1:]), {})
    job = _job(run)
    committed = committed_steps(checkpoints_folder(job, run) if job else run / "checkpoints")
    state = _state(run, result, age)
    return RunStatus(
        run=run.name,
        folder=str(run),
        state=state,
        error=problem or (result.error if result and state == result.status else None),
        step=max([int(last.get("step", 0)), *committed]),
        steps=_total_steps(events, job),
        last_checkpoint=committed[-1] if committed else None,
        loss=_number(last, "loss"),
        tokens_per_s=_number(last, "tokens_per_s"),
        event_age_s=age,
        registered=f"{result.registry.model} version {result.registry.version}" if result and result.registry else None,
        **_best(run, job),
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
    return (run.path / EVENTS).stat().st_mtime > (run.path / "result.json").stat().st_mtime + 5


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


def _result(run: Folder) -> tuple[RunResult | None, str | None]:
    """The committed result, and what is wrong with it where it cannot be read."""
    if not run.exists("result.json"):
        return None, None
    try:
        return RunResult.model_validate_json(run.read_bytes("result.json")), None
    except ValueError as error:
        return None, f"result.json is damaged: {str(error).splitlines()[0]}"


def _job(run: Folder) -> Job | None:
    """The resolved job, None where it is not written yet or of another version of this program."""
    if not run.exists("job.yaml"):
        return None
    try:
        raw = yaml.safe_load(run.read_bytes("job.yaml"))
        return parse_job(raw) if isinstance(raw, dict) else None
    except (yaml.YAMLError, JobError):
        return None


def _total_steps(events: list[Event], job: Job | None) -> int | None:
    """As the ranks said at their start, else as the job says."""
    said = [event["steps"] for event in events if event["kind"] == "start" and isinstance(event.get("steps"), int)]
    return said[-1] if said else (job.train.steps if job else None)


def _best(run: Folder, job: Job | None) -> dict[str, Any]:
    """The best evaluation so far, as fields of the status."""
    if job is None:
        return {}
    task = load_task(job.task)
    metric = job.evaluate.metric or task.metric
    sign = 1 if (job.evaluate.mode or task.better_mode(metric)) == "max" else -1
    values = {one.step: one.metrics[metric] for one in _evaluations(run) if metric in one.metrics}
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    if not values:
        return {"metric": metric}
    best = max(values, key=lambda step: (sign * values[step], -step))
    return {"metric": metric, "best_step": best, "best_value": values[best]}


def _evaluations(run: Folder) -> list[Evaluation]:
    """The evaluations that are done; one that cannot be read is not done."""
    folder, found = run / "evals", []
    for name in folder.list():
        if not name.endswith(".json") or parse_step(name) is None:
            continue
        try:
            one = Evaluation.model_validate_json(folder.read_bytes(name))
        except ValueError:
            continue
        found += [one] if one.status == "done" else []
    return found


def _number(event: Event, name: str) -> float | None:
    value = event.get(name)
    return value if isinstance(value, int | float) else None
