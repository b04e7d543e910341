"""The controller's hold on a run folder: its lock, its log, its clock, and the record it ends with."""

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

import yaml

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.run.folder import RunResult
from trainers.run.goodput import account, share
from trainers.run.log import RunLog, read_events
from trainers.storage import Folder

LOCK = "driver.lock"
RESULT = "result.json"


class OpenRun:
    """A run folder that this process owns."""

    def __init__(self, folder: Folder, job: Job) -> None:
        self.folder, self.job = folder, job
        self.log = RunLog(folder)
        self._steps = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to the stage, also where it ends with an exception."""
        began = time.monotonic()
        self.log.append({"kind": "stage_start", "stage": stage})
        try:
            yield
        finally:
            self.note_stage(stage, time.monotonic() - began)

    def note_stage(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage."""
        self.log.append({"kind": "stage", "stage": stage, "seconds": seconds})

    def steps(self, event: Mapping[str, Any]) -> int:
        """Steps of the whole run, as the ranks said at their start."""
        self._steps = int(event.get("steps", self._steps))
        return self._steps

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened so far, earlier attempts included."""
        return read_events(self.folder)


@contextmanager
def open_run(folder: Folder, job: Job) -> Iterator[OpenRun]:
    """Own a run folder for the length of the block.

    Raises:
        JobError: where another controller is at work on it.
    """
    folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False).encode())
    with (folder.path / LOCK).open("w") as lock:
        if not _lock(lock):
            time.sleep(0.2)  # `tuneyard status` holds it for a moment when it looks
        if not _lock(lock):
            raise JobError(f"another `tuneyard run` is at work on {folder}; wait for it or stop it first")
        opened = OpenRun(folder, job)
        try:
            yield opened
        finally:
            opened.log.close()


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def finished_result(folder: Folder) -> RunResult | None:
    """The result of a run that is done, or None."""
    try:
        result = RunResult.model_validate_json(folder.read_bytes(RESULT))
    except FileNotFoundError:
        return None
    return result if result.status == "done" else None


def summarize(opened: OpenRun, status: Literal["done", "failed", "preempted"], error: str | None) -> RunResult:
    """What the log says of the run, over all attempts."""
    events = opened.events()
    steps = {event["step"]: event for event in events if event["kind"] == "step"}  # a step done again counts once
    seconds: dict[str, float] = {}
    for event in events:
        if event["kind"] == "stage":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    spent = account(events)
    last = steps[max(steps)] if steps else {}
    return RunResult(
        status=status,
        error=error,
        steps=int(last.get("step", 0)),
        tokens=int(last.get("tokens", 0)),
        restarts=max(sum(event["kind"] == "start" for event in events) - 1, 0),
        goodput=share(spent),
        accounting=spent,
        seconds=seconds,
    )
