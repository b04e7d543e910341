"""What is known of a sweep: sweep.json in its folder, written whenever a trial is begun or comes to a stop."""

import math
from typing import Any, Literal

from trainers.records import Record
from trainers.run.folder import RegisteredVersion
from trainers.storage import Folder
from trainers.tasks import Mode

SWEEP = "sweep.json"
State = Literal["waiting", "paused", "trained", "failed"]
"""waiting: not yet, or under way. paused: stopped at a committed checkpoint, by halving."""


class Copy(Record):
    """A decision of population-based training: a trial gives up its run and goes on from another's checkpoint."""

    generation: int
    """That has ended, from 1."""
    trial: int
    parent: int
    """Number of the trial whose checkpoint it takes."""
    step: int
    values: dict[str, Any]
    """From that step on."""
    left: str = ""
    """Name of the run folder that the trial gives up."""


class Stretch(Record):
    """Steps that a trial has from another trial's run: what it had from there, from the first step to this one."""

    trial: int
    run: str
    """Name of its run folder."""
    values: dict[str, Any]
    step: int
    """The last of its steps that counts."""
    digest: str
    """Of that checkpoint: `trainers.job.sections.ContinueSection`."""


class Trial(Record):
    """One run of a sweep; under population-based training the newest of a line of runs."""

    number: int
    """From 1."""
    values: dict[str, Any]
    run: str
    """Name of its run folder; empty while its data is not sharded."""
    state: State = "waiting"
    steps: int = 0
    """Of the whole training; 0 while that is not known."""
    step: int = 0
    """That it has come to."""
    pauses: tuple[int, ...] = ()
    """Steps at which halving looks at it."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and deciding metric of each evaluation, by step."""
    error: str | None = None
    line: tuple[Stretch, ...] = ()
    """Where its run began: the runs that trained the steps before, the oldest first; empty: at the model."""

    def best(self, mode: Mode, until: int | None = None) -> tuple[int, float] | None:
        """Step and value of the best evaluation up to a step; the earliest of equals. NaN is never best."""
        sign = 1.0 if mode == "min" else -1.0
        usable = [one for one in self.curve if math.isfinite(one[1]) and (until is None or one[0] <= until)]
        return min(usable, key=lambda one: (sign * one[1], one[0]), default=None)


class SweepRecord(Record):
    """sweep.json."""

    schema_version: int = 1
    job: str
    """Name of the job."""
    fields: tuple[str, ...]
    method: str
    halving: int | None
    metric: str
    mode: Mode
    trials: tuple[Trial, ...] = ()
    copies: tuple[Copy, ...] = ()
    """Of population-based training, every decision in the order it was made."""
    generations: int = 0
    """Of population-based training: ends of generations that were decided upon."""
    best: int | None = None
    """Number of the trial whose model is registered."""
    registry: RegisteredVersion | None = None

    def ranked(self) -> list[Trial]:
        """The best first; those without an evaluation last."""
        sign = 1.0 if self.mode == "min" else -1.0

        def key(trial: Trial) -> tuple[bool, float, int]:
            best = trial.best(self.mode)
            return best is None, sign * best[1] if best else 0.0, trial.number

        return sorted(self.trials, key=key)

    def updated(self, trial: Trial) -> "SweepRecord":
        """With a trial in the place of the one with its number, or after the last."""
        others = [one for one in self.trials if one.number != trial.number]
        return self.model_copy(update={"trials": tuple(sorted([*others, trial], key=lambda one: one.number))})


def write_sweep(folder: Folder, record: SweepRecord) -> None:
    """Commit the record."""
    folder.write_bytes(SWEEP, record.model_dump_json(indent=1).encode())


def read_sweep(folder: Folder) -> SweepRecord | None:
    """The committed record, None if there is none. Raises ValueError if it is damaged."""
    try:
        return SweepRecord.model_validate_json(folder.read_bytes(SWEEP))
    except FileNotFoundError:
        return None
