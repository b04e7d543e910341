"""One leg of a trial: from its newest committed checkpoint to its next pause or its end, in a process that runs one leg
after another.

A trial is an ordinary run in its own folder; nothing is registered here. The process takes no cores: the node agents of
the run place its ranks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import ray
from rich.console import Console

from orchestrator.planning.preflight import check_job
from orchestrator.run import train
from orchestrator.run_session import Asked, RunSession
from orchestrator.sharding.stage import write_shards
from orchestrator.terminal.progress import Screen
from orchestrator.training.controller import finished_training
from orchestrator.training.kept_agents import KeptAgents
from trainers.checkpoint.reading import committed_steps
from trainers.errors import PlacementError, Preempted, TrainingError, describe, may_pass, to_record
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.events import EvaluationEvent, Event, read_events, steps_of
from trainers.run.folder import read_evaluations
from trainers.run.lock import LET_GO_S, FolderInUse
from trainers.run.record import Run, run_of
from trainers.storage import Folder

STOP = "stop"
"""A file in the sweep's folder that asks all legs to stop at a committed step."""
STOP_LOOK_S = 1.0
LOCK_WAIT_S = 120.0
"""How long the leg of a command that was killed may hold the run folder: it ends with its Ray."""
KEPT = KeptAgents()
"""This process's, from one leg to the next."""
ROOM_PAUSE_S = 10.0
"""Between two tries of what may pass, such as looks for room, beside the time that the training itself waits for it."""


class Leg(Record):
    """What a trial's process is told."""

    sweep: Folder
    job: Job
    until: int | None


class LegEnd(Record):
    """What it says at its end."""

    step: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    trained: bool = False
    """To the end of its training, and not to a pause."""
    stopped: bool = False
    """On request, before the leg's end."""
    may_pass: bool = False
    """The error: the same leg may go well later."""


class LegScreen(Screen):
    """Passes evaluations on to the sweep; the rest stands in the run's own log."""

    def __init__(self, say: Callable[[str], None], metric: str) -> None:
        super().__init__(Console(quiet=True))
        self._tell, self.metric = say, metric

    def on_event(self, event: Event, steps: int) -> None:
        """Tell of an evaluation."""
        if isinstance(event, EvaluationEvent):
            value = event.metrics.get(self.metric)
            known = event.error or f"no {self.metric}" if value is None else f"{self.metric} {value:.4f}"
            self._tell(f"step {event.step:,} of {steps:,}: {known}")


def run_leg(leg: Leg, say: Callable[[str], None]) -> LegEnd:
    """Train to the leg's end, evaluate, and say how far it came; a failure is the trial's, not the sweep's.

    Args:
        leg: of a trial whose shards are written.
        say: takes a line for the sweep's terminal.
    """
    run, metric = None, ""
    try:
        checked = check_job(leg.job)
        screen = LegScreen(say, "")
        session = RunSession(checked, screen)
        metric = screen.metric = session.metric[0]
        run = run_of(checked.job, checked.model, write_shards(checked)).model_copy(update={"until": leg.until})
        train_where_it_is_free(session, run, leg, say)
        return _end(run, metric)
    except Preempted:
        return LegEnd(stopped=True)
    except Exception as error:
        logging.getLogger(__name__).exception("the trial failed")
        failed = failed_leg(error)
    try:
        if failed.may_pass:
            _pause(leg)
        return failed if run is None else _end(run, metric, failed)
    except Preempted:
        return LegEnd(stopped=True)
    except OSError:  # how far it came cannot be read now
        return failed


def failed_leg(error: BaseException) -> LegEnd:
    """The end of a leg for an error. It may go well later where storage, memory or a node failed; not where training,
    which starts again by itself, has given up."""
    passes = isinstance(error, ray.exceptions.RayError | FolderInUse) or may_pass(error)
    return LegEnd(error=describe(to_record(error)), may_pass=passes and not isinstance(error, TrainingError))


def train_where_it_is_free(session: RunSession, run: Run, leg: Leg, say: Callable[[str], None]) -> None:
    """Another command may be at work on the run for long: a sweep waits for it."""
    told = False
    while True:
        try:
            with session.hold(run, LET_GO_S if told else LOCK_WAIT_S):
                if not committed_steps(run.checkpoints):  # what an earlier sweep cleaned away is trained anew
                    (run.folder / "evals").delete()
                train_where_there_is_room(session, leg, say)
            return
        except FolderInUse as error:
            if not told:
                say(f"waits: {error}")
            told = True
        _pause(leg)


def train_where_there_is_room(session: RunSession, leg: Leg, say: Callable[[str], None]) -> None:
    """Other work on the cluster may hold its room for long: a sweep waits for it."""
    asked, said = partial(_stop_asked_for, leg.sweep), ""
    while True:
        try:
            train(session, asked, KEPT, anew=True)
            return
        except PlacementError as error:
            if str(error) != said:
                said = str(error)
                say(f"waits for room: {error}")
        _pause(leg)


def _pause(leg: Leg) -> None:
    """Raises Preempted where the sweep is to stop meanwhile."""
    with _stop_asked_for(leg.sweep) as stop:
        again_at = time.monotonic() + ROOM_PAUSE_S
        while time.monotonic() < again_at:
            if stop():
                raise Preempted("stopped while it waited")
            time.sleep(STOP_LOOK_S)


@contextmanager
def _stop_asked_for(sweep: Folder) -> Iterator[Asked]:
    """As `run_session.stop_asked_for`, told by a file: this process may be on another host than the command."""
    looked, there = 0.0, threading.Event()

    def look() -> bool:
        nonlocal looked
        if not there.is_set() and time.monotonic() - looked > STOP_LOOK_S:
            looked = time.monotonic()
            if sweep.exists(STOP):
                there.set()
        return there.is_set()

    yield look


def _end(run: Run, metric: str, end: LegEnd | None = None) -> LegEnd:
    last = max((event.step for event in steps_of(read_events(run.folder))), default=0)
    step = min(last, run.until or last)
    done = [one for one in read_evaluations(run.folder, run.shards.eval.key) if one.status == "done"]
    curve = tuple((one.step, one.metrics[metric]) for one in done if 0 < one.step <= step and metric in one.metrics)
    trained = finished_training(run.folder, run.checkpoints) is not None
    return (end or LegEnd()).model_copy(update={"step": step, "curve": curve, "trained": trained})
