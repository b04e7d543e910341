"""The end of a generation of population-based training: decided, recorded, then acted on. Begin at `end_generation`."""

from typing import Protocol

from orchestrator.sweep.leg import LOCK_WAIT_S
from orchestrator.sweep.population import decide
from orchestrator.sweep.record import Copy, Stretch, SweepRecord, Trial, write_sweep
from orchestrator.sweep.spec import SweepSpec, told
from trainers.checkpoint.records import COMMITTED
from trainers.errors import TrainingError
from trainers.job.schema import Job
from trainers.job.sections import ContinueSection
from trainers.run.folder import checkpoints_folder, step_name
from trainers.run.lock import own_folder
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.training.continuing import begin_from_parent


class Members(Protocol):
    """What is needed of the sweep."""

    spec: SweepSpec
    folder: Folder
    record: SweepRecord

    def trial(self, number: int) -> Trial:
        """The trial of a number."""

    def job_of(self, trial: Trial) -> Job:
        """As it runs."""

    def say(self, number: int, line: str) -> None:
        """Tell something of a trial."""


def end_generation(sweep: Members) -> None:
    """Decide who copies whom, and record it: a command that is killed after that acts on the same decisions.

    Raises:
        TrainingError: where a checkpoint that should be copied is not there.
    """
    record = sweep.record
    copies = tuple(copy.model_copy(update={"left": sweep.trial(copy.trial).run})
                   for copy in decide(sweep.spec, record.trials, record.generations, record.mode))  # fmt: skip
    for copy in copies:
        record = record.updated(_copied(sweep, copy))
    done = {"copies": (*record.copies, *copies), "generations": record.generations + 1}
    sweep.record = record.model_copy(update=done)
    write_sweep(sweep.folder, sweep.record)
    for copy in copies:
        sweep.say(copy.trial, f"goes on from trial {copy.parent} at step {copy.step}")


def _copied(sweep: Members, copy: Copy) -> Trial:
    """The trial as it goes on from its parent's checkpoint, its new run not begun."""
    parent = sweep.trial(copy.parent)
    checkpoints = checkpoints_folder(sweep.job_of(parent), runs_folder(sweep.folder) / parent.run)
    try:
        digest = (checkpoints / step_name(copy.step)).read_bytes(COMMITTED).decode()
    except FileNotFoundError:
        raise TrainingError(f"trial {parent.number} ({told(parent.values)}) has come to step {copy.step}, but "
                            f"{checkpoints} holds no checkpoint of it") from None  # fmt: skip
    stretch = Stretch(trial=parent.number, run=parent.run, values=parent.values, step=copy.step, digest=digest)
    return Trial(number=copy.trial, values=copy.values, run="", state="paused", steps=parent.steps, step=copy.step,
                 pauses=parent.pauses, line=(*parent.line, stretch))  # fmt: skip


def origin(sweep: Folder, stretch: Stretch) -> ContinueSection:
    """Where the run after a stretch begins."""
    run = runs_folder(sweep) / stretch.run
    return ContinueSection(run=run.uri, step=stretch.step, digest=stretch.digest)


def begin_held(run: Run, steps: int) -> None:
    """Take over the parent's checkpoint; what an earlier sweep evaluated of this run before it was cleaned goes."""
    with own_folder(run.folder, LOCK_WAIT_S):
        if begin_from_parent(run, steps):
            (run.folder / "evals").delete()


def runs_folder(sweep: Folder) -> Folder:
    """Where the runs of a sweep's storage are."""
    return sweep.parent.parent / "runs"
