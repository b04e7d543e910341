"""Trains one job on one node without Ray: `torchrun ... -m trainers JOB` or `accelerate launch ... -m trainers JOB`.

Reads the shards that `tuneyard shard JOB` wrote, and writes the same run folder as `tuneyard run`, which then evaluates
and registers what was trained here.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from trainers.checkpoint.cleaning import remove_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.retention import deletable
from trainers.errors import JobError, Preempted, TuneyardError
from trainers.job.load import load_job
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.records import Phase, StopReason
from trainers.run.folder import checkpoints_folder, run_folder
from trainers.run.log import RunLog
from trainers.run.record import TrainRequest
from trainers.shards.keys import load_shards
from trainers.shards.manifest import check_labels, shards_folder
from trainers.storage import Folder
from trainers.training.loop import LoopOutcome
from trainers.worker.rank import run_rank
from trainers.worker.stop_signal import StopSignal


class LocalHooks:
    """Hooks of a launch without a controller: rank 0 keeps the run's log and thins out its checkpoints."""

    def __init__(self, run: Folder, job: Job) -> None:
        self._run, self._keep, self._checkpoints = run, job.checkpoint.keep, checkpoints_folder(job, run)
        self._log: RunLog | None = None
        self._stop = StopSignal(job.checkpoint.grace_s)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Record an event and print it as a line; only rank 0 does."""
        self._log = self._log or RunLog(self._run)
        self._log.append(event)
        if event["kind"] != "history":
            print(describe(event), flush=True)
        if event["kind"] == "checkpoint":
            for step in deletable(committed_steps(self._checkpoints), self._keep, ()):
                remove_checkpoint(self._checkpoints, step)

    def stop_reason(self) -> StopReason | None:
        """preempted after SIGTERM."""
        return self._stop.reason()

    def at(self, phase: Phase, step: int) -> None:
        """Nobody watches the heartbeat here: the launcher sees deaths alone."""


def describe(event: Mapping[str, Any]) -> str:
    """An event as a line with its values."""
    values = ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.items()
        if name not in ("kind", "time")
    )
    return f"{event['kind']}: {values}"


def make_request(job: Job) -> TrainRequest:
    """What the ranks train on. Raises JobError where the shards are not there yet."""
    model = find_model(job)
    shards = load_shards(job, model.path) if model else None
    if model is None or shards is None:
        raise JobError("the data is not sharded yet: run `tuneyard shard JOB` with the same job file first")
    check_labels(shards)
    storage = Folder(job.storage)
    return TrainRequest(
        job, model, shards.train, shards_folder(storage, shards.train.key), run_folder(job, model.digest, shards)
    )


def main() -> NoReturn:
    """Parse, train, exit with the code of what happened.

    All that counts is on storage by then. The interpreter's own end is passed over: gloo's threads, still there, abort
    one process in twenty while it takes itself apart ("terminate called without an active exception").
    """
    code = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a value")
    arguments = parser.parse_args()
    try:
        job = load_job(arguments.job, arguments.set)
        request = make_request(job)
        _finish(run_rank(request, LocalHooks(request.run, job)))
    except TuneyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _finish(outcome: LoopOutcome) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    if outcome.stopped == "preempted":
        raise Preempted(f"stopped at step {outcome.progress.step}, committed; the same command goes on")


if __name__ == "__main__":
    main()
