"""The sweep: read, check, run the trials, register the best, clean up after the others. Begin at `run_sweep`.

Its record says what every trial has come to, so the same command goes on with what is left; each trial's own progress
stands in its run folder.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.planning.preflight import CheckedJob, check_job
from orchestrator.ray_session import check_placement, ray_session
from orchestrator.report.page import REPORT
from orchestrator.run import register
from orchestrator.run_session import Asked, RunSession, plan_here, stop_asked_for
from orchestrator.sharding.stage import write_shards
from orchestrator.sweep.check import check_trials
from orchestrator.sweep.cleanup import clean_run
from orchestrator.sweep.generation import begin_held, end_generation, origin, runs_folder
from orchestrator.sweep.halving import next_stop, next_trial, pause_steps
from orchestrator.sweep.leg import ROOM_PAUSE_S, Leg, LegEnd, failed_leg
from orchestrator.sweep.page import write_page
from orchestrator.sweep.population import ends_of_generations, is_over, next_member
from orchestrator.sweep.record import SweepRecord, Trial, read_sweep, write_sweep
from orchestrator.sweep.spec import SweepSpec, told, trial_job
from orchestrator.sweep.tpe import propose
from orchestrator.sweep.tuner import run_legs, trials_at_once
from orchestrator.terminal.progress import Screen
from trainers.checkpoint.cleaning import finish_removals
from trainers.errors import Preempted, TrainingError, TuneyardError
from trainers.evaluation.selection import select
from trainers.job.schema import Job
from trainers.run.folder import read_evaluations
from trainers.run.lock import own_folder
from trainers.run.record import run_of
from trainers.shards.manifest import Shards
from trainers.shards.worth import check_metric
from trainers.storage import Folder
from trainers.tasks import choose_metric

MOST_DEATHS = 3
"""Times that a trial's process may die without a word, or end with what may pass, before the trial counts as failed."""
TRIALS_OWN = (TuneyardError, OSError, ray.exceptions.RayError)
"""What ends a trial and not the sweep, such as data that its values make unfit."""


@dataclass
class Sweep:
    """One command at work on one sweep: the desk that legs are given out from."""

    spec: SweepSpec
    overrides: Sequence[str]
    folder: Folder
    record: SweepRecord
    screen: Screen
    wants_stop: Asked
    busy: set[int] = field(default_factory=set)
    deaths: dict[int, int] = field(default_factory=dict)
    cleaned: set[str] = field(default_factory=set)
    """Run folders."""

    def next_leg(self) -> tuple[int, Leg] | None:
        """See `tuner.Desk`."""
        self._add_trial()
        while (number := self._next()) is not None:
            try:
                trial = self._begun(self.trial(number))
            except TRIALS_OWN as error:
                self._fail(number, error)
                if self.wants_stop():
                    return None
                continue
            self.busy.add(number)
            return number, Leg(sweep=self.folder, job=self.job_of(trial), until=next_stop(trial))
        return None

    def _next(self) -> int | None:
        """The trial that should train now."""
        if self.spec.method != "population":
            return next_trial(self.record.trials, self.busy, self.spec.halving, self.record.mode)
        self._take_over()
        while is_over(self.record.trials, self.busy, self.record.generations):
            end_generation(self)
            self._take_over()
        return next_member(self.record.trials, self.busy, self.record.generations)

    def _take_over(self) -> None:
        """Who copies holds its parent's checkpoint before anybody trains on, for training deletes older ones."""
        for trial in self.record.trials:
            if trial.line and not trial.run and trial.state == "paused":
                try:
                    self._begun(trial)
                except TRIALS_OWN as error:
                    self._fail(trial.number, error)

    def _fail(self, number: int, error: Exception) -> None:
        """A trial could not begin."""
        end = failed_leg(error)
        if end.may_pass and not self.wants_stop():
            time.sleep(ROOM_PAUSE_S)
        self.take(number, end)

    def _add_trial(self) -> None:
        """One more, where the values of trials come from those before and nobody waits."""
        trials, most = self.record.trials, self.spec.trials or 0
        waits = any(trial.state == "waiting" and trial.number not in self.busy for trial in trials)
        if self.spec.method == "tpe" and not waits and len(trials) < most:
            values = propose(self.spec, trials, self.record.mode)
            if values is not None:
                self._note(Trial(number=len(trials) + 1, values=values, run=""))

    def _begun(self, trial: Trial) -> Trial:
        """With its shards written, its run's name and its pauses known."""
        if trial.run:
            return trial
        checked = check_job(self.job_of(trial))
        run = run_of(checked.job, checked.model, _write_shards(checked, self.screen))
        job, steps, count = run.job, plan_here(checked).steps, self.spec.trials or len(self.record.trials)
        if trial.line:
            pauses = trial.pauses
            begin_held(run, steps)
        else:
            pauses = pauses_of(self.spec, job, steps, count)
        return self._note(trial.model_copy(update={"run": run.folder.name, "steps": steps, "pauses": pauses}))

    def take(self, number: int, end: LegEnd | None) -> None:
        """See `tuner.Desk`."""
        self.busy.discard(number)
        trial = self.trial(number)
        if end is None or end.may_pass:
            self.deaths[number] = self.deaths.get(number, 0) + 1
            if self.deaths[number] < MOST_DEATHS or self.wants_stop():
                if end:
                    self.say(number, f"it is tried again: {end.error}")
                return
            end = end or LegEnd(error=f"its process died {MOST_DEATHS} times")
        if end.stopped:
            return
        state = "failed" if end.error else "trained" if end.trained else "paused"
        came = {"error"} if end.error and not end.step else {"step", "curve", "error"}  # not known: as it was
        trial = self._note(trial.model_copy(update={**end.model_dump(include=came), "state": state}))
        best = trial.best(self.record.mode)
        value = f"{self.record.metric} {best[1]:.4f} at step {best[0]}" if best else end.error or "no evaluation"
        self.say(number, f"{state} after step {trial.step} of {trial.steps}: {value}")
        self.clean(self.record.ranked()[0].number)

    def _note(self, trial: Trial) -> Trial:
        self.record = self.record.updated(trial)
        write_sweep(self.folder, self.record)
        return trial

    def trial(self, number: int) -> Trial:
        """The trial of a number."""
        return next(trial for trial in self.record.trials if trial.number == number)

    def job_of(self, trial: Trial) -> Job:
        """As it runs: all devices may be taken by trials, so the ranks evaluate unless the job says otherwise."""
        job = trial_job(self.spec, self.overrides, trial.values)
        on_ranks = job.evaluate.on == "auto" and job.evaluate.while_training
        place: dict[str, Any] = {"evaluate": job.evaluate.model_copy(update={"on": "ranks"})} if on_ranks else {}
        if trial.line:
            place["train"] = job.train.model_copy(update={"continue_from": origin(self.folder, trial.line[-1])})
        return job.model_copy(update=place)

    def say(self, number: int, line: str) -> None:
        """See `tuner.Desk`."""
        self.screen.say(f"trial {number} ({told(self.trial(number).values)}): {line}")

    def clean(self, best: int, everything: bool = False) -> None:
        """Clean the runs of trials that have ended and are not the best, and those that were given up."""
        trials = self.record.trials
        ended = {trial.run for trial in trials if everything or trial.state in ("trained", "failed")}
        left = {copy.left for copy in self.record.copies} - {trial.run for trial in trials}
        for name in sorted((ended | left) - {"", self.trial(best).run} - self.cleaned):
            if clean_run(self.job_of(trials[0]), runs_folder(self.folder) / name):
                self.cleaned.add(name)


def run_sweep(
    spec: SweepSpec, overrides: Sequence[str], address: str | None, screen: Screen
) -> tuple[Folder, SweepRecord]:
    """Run a sweep to its registered model, or go on with it.

    Returns:
        Its folder, and the record that stands in it.

    Raises:
        JobError: with every problem of any trial, before anything starts.
        Preempted: on SIGTERM or Ctrl-C; every trial stands at a committed step.
        TrainingError: no trial came to an evaluation.
    """
    checked, points = check_trials(spec, overrides)
    folder = sweep_folder(spec, checked)
    if record := _done(folder, screen):
        return folder, record
    folder.path.mkdir(parents=True, exist_ok=True)
    with ray_session(address), stop_asked_for() as asked, own_folder(folder), screen.live():
        if record := _done(folder, screen):  # by another command, which had the folder until now
            return folder, record
        record = read_sweep(folder) or _new_record(spec, checked, points)
        gpus = check_placement(checked.job.scale)
        sweep = Sweep(spec, overrides, folder, record, screen, asked)
        write_sweep(folder, record)
        if not any(trial.run for trial in record.trials):
            _write_shards(checked, screen)  # data that is refused ends the sweep before its first trial
            if spec.generations:
                pauses_of(spec, checked.job, plan_here(checked).steps, len(points))
        if record.best is None:
            run_legs(sweep, folder, trials_at_once(checked.job, gpus))
            if asked():
                raise Preempted("stopped on request; the same command goes on from there")
            _register_best(sweep)
        sweep.clean(sweep.record.best or 0, everything=True)
        finish_removals()
        write_page(folder, sweep.record)
        return folder, sweep.record


def _done(folder: Folder, screen: Screen) -> SweepRecord | None:
    """The record of a sweep that is over, and says so."""
    record = read_sweep(folder)
    if record is None or not record.registry or not folder.exists(REPORT):  # which is written last
        return None
    screen.say(f"already done: {folder}")
    return record


def pauses_of(spec: SweepSpec, job: Job, steps: int, trials: int) -> tuple[int, ...]:
    """Steps at which a trial stops to be compared; those before the step at which it begins are passed over."""
    every = job.checkpoint.every_steps
    if spec.generations:
        found = ends_of_generations(steps, every, spec.generations)
    else:
        found = pause_steps(steps, every, spec.halving, trials, spec.pauses)
    begins = job.train.continue_from.step if job.train.continue_from else 0
    return tuple(step for step in found if step > begins)


def sweep_folder(spec: SweepSpec, checked: CheckedJob) -> Folder:
    """Where the sweep's record lies: another job, model, data or space is another sweep."""
    job = checked.job
    parts = (spec.digest(), job.identity(), checked.model.digest, *(split.key for split in checked.splits))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Folder(job.storage) / "sweeps" / f"{job.name}-{digest[:8]}"


def _new_record(spec: SweepSpec, checked: CheckedJob, points: Sequence[dict[str, Any]]) -> SweepRecord:
    metric, mode = choose_metric(checked.job)
    trials = tuple(Trial(number=number, values=values, run="") for number, values in enumerate(points, 1))
    return SweepRecord(job=checked.job.name, fields=tuple(spec.space), method=spec.method, halving=spec.halving,
                       metric=metric, mode=mode, trials=trials)  # fmt: skip


def _write_shards(checked: CheckedJob, screen: Screen) -> Shards:
    """Raises DataError where the job refuses what they hold."""
    shards = write_shards(checked, screen.on_shards)
    check_metric(checked.job, shards, checked.model.path)
    return shards


def _register_best(sweep: Sweep) -> None:
    """Register the best checkpoint of all trials, through every run's gate."""
    record = sweep.record
    winner = record.ranked()[0]
    if winner.best(record.mode) is None:
        raise TrainingError("; ".join(f"trial {one.number} ({told(one.values)}): {one.error}" for one in record.trials))
    checked = check_job(sweep.job_of(winner))
    session = RunSession(checked, sweep.screen)
    with session.hold(run_of(checked.job, checked.model, write_shards(checked))):
        evaluations = read_evaluations(session.run.folder, session.run.shards.eval.key)
        best = select([one for one in evaluations if one.step <= winner.step], *session.metric)
        version = register(session, best)
        session.finish(evaluations, best, version)
    sweep.record = record.model_copy(update={"best": winner.number, "registry": version})
    write_sweep(sweep.folder, sweep.record)
