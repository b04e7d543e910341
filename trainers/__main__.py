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
from trainers.errors import Preempted, TuneyardError
from trainers.job.load import load_job
from trainers.records import Phase, StopReason
from trainers.run.log import RunLog
from trainers.run.record import Run, find_run
from trainers.training.loop import LoopOutcome
from trainers.worker.rank import run_rank
from trainers.worker.stop_signal import StopSignal


class LocalHooks:
    """Hooks of a launch without a controller: rank 0 keeps the run's log and thins out its checkpoints."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log: RunLog | None = None
        self._stop = StopSignal(run.job.checkpoint.grace_s)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Record an event and print it as a line; only rank 0 does."""
        self._log = self._log or RunLog(self._run.folder)
        self._log.append(event)
        if event["kind"] != "history":
            print(describe(event), flush=True)
        if event["kind"] == "checkpoint":
            checkpoints = self._run.checkpoints
            for step in deletable(committed_steps(checkpoints), self._run.job.checkpoint.keep, ()):
                remove_checkpoint(checkpoints, step)

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
        run = find_run(load_job(arguments.job, arguments.set))
        _finish(run_rank(run, LocalHooks(run)))
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
