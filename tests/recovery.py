"""The training stage by itself, with faults in its real ranks: what recovery's tests and benchmarks share."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.training.controller import train
from orchestrator.training.worker_group import WorkerGroup
from trainers.job.schema import Job
from trainers.run.events import Event, read_events
from trainers.run.log import RunLog
from trainers.run.record import find_run
from trainers.storage import Folder


def with_(job: Job, **sections: Any) -> Job:
    updated = {name: getattr(job, name).model_copy(update=values) for name, values in sections.items()}
    return job.model_copy(update=updated)


def run_training(
    job: Job,
    name: str,
    *faults: dict[str, Any],
    on_event: Callable[[Event], None] = lambda _: None,
    group: WorkerGroup | None = None,
) -> Path:
    """The training stage in this process, on a run folder of that name, with faults in the real ranks.

    Args:
        group: whose node agents stay up for more trainings; by default one for this alone.
    """
    folder = Folder(job.storage) / "runs" / name
    run = find_run(job).model_copy(update={"folder": folder})
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "faults.json").write_text(json.dumps(faults))
    pool = EvaluationPool(run, 0)
    log = RunLog(folder)
    workers = group or WorkerGroup(job, 0)
    try:
        train(run, pool, workers, log, on_event, lambda: False)
    finally:
        workers.kill() if group else workers.close()
        log.close()
    return folder.path


def events_of(run: Path, kind: str) -> list[Any]:
    return [event for event in read_events(Folder(str(run))) if event.kind == kind]


def losses(run: Path) -> dict[int, float]:
    return {event.step: event.loss for event in events_of(run, "step")}


def rank_processes() -> dict[str, int]:
    """Living ranks, by name, of the Ray that this process started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("rank-"):
                found[process.name()] = process.pid
    return found
