"""The process beside a driver that sends a run's events to MLflow, W&B or a web hook. Begin at `Follower`.

The driver starts it, writes how the run ended, and waits a little for it at the end; nothing that a server does can
slow or break the training. A driver that is killed is an end too: this process lives on to tell of it.
"""

import subprocess
import sys
from collections.abc import Callable
from threading import Thread
from typing import IO, Literal

from trainers.credentials import travelling
from trainers.run.record import Run

Word = Literal["ended", "paused"]
"""ended: result.json tells how; paused: the training may go on later. A driver that was killed says nothing."""
CLOSE_WAIT_S = 60.0
"""How long the end of a run may take to be sent."""


class Follower:
    """The process that follows one run for the length of a block, where its job wants that.

    Args:
        say: takes a line for the terminal.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._process: subprocess.Popen[bytes] | None = None
        self.word: Word | None = None
        """Said when the block ends."""

    def __enter__(self) -> "Follower":
        job = self._run.job
        if not job.notify and not {"mlflow", "wandb"} & set(job.report_to):
            return self
        import os

        logs = self._run.folder.path / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "tracking.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.tracking"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, env=os.environ | travelling(), start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._write(self._process.stdin, self._run.model_dump_json().encode() + b"\n")
        Thread(target=self._relay, args=(self._process.stdout,), daemon=True, name="tracking").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is None:
            return
        assert self._process.stdin
        self._write(self._process.stdin, (self.word or ("paused" if kind is None else "")).encode(), last=True)
        try:
            self._process.wait(CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._say(
                f"tracking: the end of the run was not sent within {CLOSE_WAIT_S:.0f} s; the run's log has it all"
            )

    def _relay(self, said: IO[bytes]) -> None:
        for line in said:
            self._say(line.decode(errors="replace").rstrip())

    def _write(self, stdin: IO[bytes], text: bytes, last: bool = False) -> None:
        try:
            stdin.write(text)
            stdin.close() if last else stdin.flush()
        except OSError:  # it ended by itself: what it said is on the terminal or in its log
            pass
