"""Trains one job on one node without Ray: `torchrun ... -m trainers JOB` or `accelerate launch ... -m trainers JOB`.

Reads the shards that `tuneyard shard JOB` wrote, and writes the same run folder as `tuneyard run`, which then evaluates
and registers what was trained here.
"""

import argparse
import os
import sys
import traceback
from contextlib import nullcontext
from typing import Literal, NoReturn

import yaml

from trainers.checkpoint.cleaning import finish_removals
from trainers.checkpoint.retention import KeptCheckpoints
from trainers.errors import JobError, Preempted, TuneyardError
from trainers.evaluation.selection import find_best, out_of_patience
from trainers.job.load import load_job
from trainers.job.schema import Job
from trainers.model.fit import check_fit
from trainers.model.lora import check_frozen
from trainers.model.source import find_model
from trainers.records import Phase, StopReason
from trainers.run.describe import describe
from trainers.run.events import CheckpointEvent, EvaluationEvent, Event, StepEvent
from trainers.run.folder import JOB_FILE, promoted_steps, read_evaluations
from trainers.run.lock import own_folder
from trainers.run.log import RunLog
from trainers.run.record import Run, find_run
from trainers.shards.worth import check_metric
from trainers.tasks import check_measures, choose_metric
from trainers.training.beginning import begin_run
from trainers.training.loop import LoopOutcome
from trainers.verification.packing import decide_packing, with_packing
from trainers.worker.launcher import check_launcher
from trainers.worker.rank import run_rank
from trainers.worker.stop_signal import StopSignal

STEP_LINES_S = 10.0
"""Seconds between two lines about steps."""


class LocalHooks:
    """Hooks of a launch without a controller: rank 0 keeps the run's log and deletes checkpoints that nothing needs."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log: RunLog | None = None
        self._stop = StopSignal(run.job.checkpoint.grace_s)
        self._told = 0.0
        self._out_of_patience = False
        self._metric = choose_metric(run.job)[0]

    def _open(self) -> RunLog:
        run = self._run
        if not run.folder.exists(JOB_FILE):  # what `tuneyard status` and other commands know the run by
            job = yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False)
            run.folder.write_bytes(JOB_FILE, job.encode())
        self._log = RunLog(run.folder, job=run.job)
        self._kept = KeptCheckpoints(run.checkpoints, run.job.checkpoint.keep)
        self._look_at_evaluations()
        return self._log

    def _look_at_evaluations(self) -> None:
        """The best checkpoint stays, and too many without a new best end the training."""
        run, stopping = self._run, self._run.job.evaluate.early_stopping
        records, metric = read_evaluations(run.folder, run.shards.eval.key), choose_metric(run.job)
        best = find_best(records, *metric)
        self._pinned = promoted_steps(run.folder) | ({best.step} if best else set())
        self._out_of_patience = stopping is not None and out_of_patience(records, *metric, stopping.patience)

    def emit(self, event: Event) -> None:
        """Record an event and print it as a line; only rank 0 does."""
        (self._log or self._open()).append(event)
        line = describe(event, self._metric)
        if line and not (isinstance(event, StepEvent) and event.time - self._told < STEP_LINES_S):
            print(line, flush=True)
            self._told = event.time if isinstance(event, StepEvent) else self._told
        self._kept.note(event)
        if isinstance(event, EvaluationEvent):
            self._look_at_evaluations()
        if isinstance(event, CheckpointEvent | EvaluationEvent):
            self._kept.prune(self._pinned)

    def stop_reason(self) -> StopReason | None:
        """preempted after SIGTERM, early_stopping where evaluations ask for it."""
        return self._stop.reason() or ("early_stopping" if self._out_of_patience else None)

    def at(self, phase: Phase, step: int) -> None:
        """Nobody watches the heartbeat here: the launcher sees deaths alone."""


def main() -> NoReturn:
    """Parse, train, exit with the code of what happened.

    All that counts is on storage by then. The interpreter's own end is passed over: gloo's threads, still there, abort
    one process in twenty while it takes itself apart ("terminate called without an active exception").
    """
    code = _main()
    finish_removals()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a value")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():  # in a file or pipe a bar is a hundred fragments
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        job = load_job(arguments.job, arguments.set)
        check_measures(job)
        notes, model = check_launcher(job, os.environ), find_model(job)
        if job.evaluate.early_stopping and not evaluates(job):
            raise JobError(
                f"evaluate.early_stopping: under this launcher the ranks alone evaluate, and evaluate.on is "
                f"{job.evaluate.on}; set it to ranks or auto, or leave early_stopping out"
            )
        if model:
            notes += check_fit(job, model.path)
            check_frozen(job, model.path)
        run = find_run(with_packing(job, decide_packing(job, model)) if model else job, model)
        if evaluates(job):
            check_metric(job, run.shards, run.model.path)
        is_first = os.environ.get("RANK", "0") == "0"
        with own_folder(run.folder) if is_first else nullcontext():
            if is_first:
                run.note_shards()
                said = begin_run(run)
                for note in (*(f"note: {note}" for note in notes), *((said,) if said else ())):
                    print(note, flush=True)
            place: Literal["free", "ranks"] = "ranks" if evaluates(job) else "free"
            _finish(run_rank(run.evaluated_on(place), LocalHooks(run)))
    except TuneyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def evaluates(job: Job) -> bool:
    """Whether the ranks evaluate, as nobody else does here; else `tuneyard run` does afterwards."""
    return job.evaluate.while_training and job.evaluate.on != "free"


def _finish(outcome: LoopOutcome) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    if outcome.stopped == "preempted":
        raise Preempted(f"stopped at step {outcome.progress.step}, committed; the same command goes on")


if __name__ == "__main__":
    main()
