"""Evaluations in flight: starts them on free resources, collects their records, writes down those that died."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray

from orchestrator.evaluation.task import evaluation_task
from orchestrator.registry.read import is_registered
from trainers.checkpoint.retention import KeptCheckpoints
from trainers.errors import EvaluationError
from trainers.evaluation.selection import BASELINE, find_best, next_evaluations, out_of_patience
from trainers.run.events import EvaluationEvent, Event, StartEvent
from trainers.run.folder import (
    Evaluation,
    failed_evaluation,
    promoted_steps,
    read_evaluations,
    write_evaluation,
)
from trainers.run.record import Run
from trainers.tasks import choose_metric
from trainers.training.beginning import set_aside

log = logging.getLogger(__name__)


class EvaluationPool:
    """The evaluations of one run, and through them which of its checkpoints are kept."""

    def __init__(self, run: Run, gpus: int) -> None:
        self._run, self._gpus = run, gpus
        self._metric = choose_metric(run.job)
        self._task = evaluation_task(run, gpus)
        self._running: dict[Any, int] = {}
        self._baseline = () if run.load_task().new_head else (BASELINE,)
        self.kept = KeptCheckpoints(run.checkpoints, run.job.checkpoint.keep)
        known = read_evaluations(run.folder, run.shards.eval.key)
        self._records = {record.step: record for record in known if record.status == "done"}

    def note(self, event: Event) -> None:
        """Follow the ranks: their checkpoints, and the evaluations that they made themselves."""
        self.kept.note(event)
        if isinstance(event, StartEvent) and event.step == 0 and self._records.keys() - {BASELINE}:
            # every checkpoint is damaged and set aside, and it may start over
            set_aside(self._run.folder, partial(is_registered, self._run.job))
            self._records = {}
        if isinstance(event, EvaluationEvent) and event.held_s:
            try:
                known = read_evaluations(self._run.folder, self._run.shards.eval.key)
            except OSError as error:
                log.warning(f"step {event.step} is evaluated again, for its record cannot be read now: {error}")
                return
            self._records |= {record.step: record for record in known if record.step == event.step}

    @property
    def records(self) -> list[Evaluation]:
        """Every evaluation known, by step."""
        return [self._records[step] for step in sorted(self._records)]

    @property
    def running(self) -> set[int]:
        """Steps being evaluated."""
        return set(self._running.values())

    def start_where_free(self) -> None:
        """Start as many evaluations as free resources hold, newest checkpoints first."""
        waiting = self.waiting()
        if waiting:
            self._start(waiting[: self._free_slots()])

    def waiting(self) -> list[int]:
        """Steps that were neither evaluated nor started, newest first."""
        committed = {*self.kept.steps, *self._baseline}
        return next_evaluations(committed, self._records.keys(), self.running, len(committed))

    def _start(self, steps: list[int]) -> None:
        for step in steps:
            self._running[self._task.remote(self._run, step, self._gpus)] = step

    def _free_slots(self) -> int:
        free, job, gpus = ray.available_resources(), self._run.job, self._gpus
        slots = int(free.get("CPU", 0.0) // job.scale.cpus_per_worker)
        slots = min(slots, int(free.get("GPU", 0.0) // gpus)) if gpus else slots
        return slots // job.evaluate.workers

    def collect(self, wait_s: float = 0.0) -> Iterator[Evaluation]:
        """Records of evaluations that ended since the last call; one whose process died gives a failed record."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=wait_s) if self._running else ([], [])
        for reference in ready:
            step = self._running.pop(reference)
            try:
                record = ray.get(reference)
            except ray.exceptions.RayError as error:
                lost = EvaluationError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                record = failed_evaluation(step, self._run.shards.eval.key, lost)
                try:
                    write_evaluation(self._run.folder, record)
                except OSError as unwritten:  # a later command evaluates it again
                    log.warning(f"the record of step {step}, {record.error}, cannot be written now: {unwritten}")
            self._records[step] = record
            yield record

    def finish(self) -> Iterator[Evaluation]:
        """Evaluate all that is left, as Ray finds room, and give the records as they come."""
        self._start(self.waiting())
        while self._running:
            yield from self.collect(wait_s=1.0)

    def prune(self) -> None:
        """Delete checkpoints that nothing needs: not the newest, best or promoted, not in evaluation.

        Where they are evaluated while the training runs, those that are still to be evaluated stay too, as far as the
        disk allows.
        """
        best = find_best(self.records, *self._metric)
        try:
            promoted = promoted_steps(self._run.folder)
        except OSError as error:  # what must stay is not known now: nothing goes before it is
            log.warning(f"no checkpoint is deleted while {self._run.folder} cannot be read: {error}")
            return
        pinned = {*self.running, *promoted, *((best.step,) if best else ())}
        self.kept.prune(pinned, self.waiting() if self._run.job.evaluate.while_training else ())

    def out_of_patience(self) -> bool:
        """Whether evaluate.early_stopping asks to stop now."""
        stopping = self._run.job.evaluate.early_stopping
        return stopping is not None and out_of_patience(self.records, *self._metric, stopping.patience)
