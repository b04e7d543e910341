"""A rank's end of its writer process: starts it, hands it saves, hears what became of them, replaces it if it dies."""

import contextlib
import os
import select
import subprocess
import sys
import time

from trainers.checkpoint.records import SaveReport, SaveRequest

DEATHS = 2
"""Times a writer may die over one save before that save is given up."""
CLOSE_S = 5.0


class WriterLink:
    """One writer process at a time, and at most one save in its hands."""

    def __init__(self, data_descriptor: int) -> None:
        self._data = data_descriptor
        self._request = os.memfd_create("tuneyard-request")
        self._pending: SaveRequest | None = None
        self._deaths, self._hurried = 0, False
        self._heard, self._sign = b"", time.monotonic()
        self._start()

    def _start(self) -> None:
        """A process of its own session, so that a signal to the rank's group does not tear a file; no socket passes."""
        descriptors = (self._data, self._request)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainers.checkpoint.writer", *map(str, descriptors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            bufsize=0,
        )
        self._heard, self._sign = b"", time.monotonic()

    @property
    def busy(self) -> bool:
        return self._pending is not None

    @property
    def silent_s(self) -> float:
        """How long ago the writer last showed a sign of life, as far as `hear` has looked."""
        return time.monotonic() - self._sign

    def send(self, request: SaveRequest) -> None:
        """Have a save carried out; the one before must have been heard of."""
        assert not self.busy, "one save at a time: the buffer is still being read"
        self._deaths, self._hurried = 0, False
        self._hand_over(request)

    def _hand_over(self, request: SaveRequest) -> None:
        self._pending, self._sign = request, time.monotonic()
        data = request.model_dump_json().encode()
        os.ftruncate(self._request, 0)
        os.pwrite(self._request, data, 0)
        self._say(len(data))

    def hurry(self) -> None:
        """Let the writer know that the rank waits for it."""
        self._hurried = True
        self._say(0)

    def _say(self, number: int) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `hear` finds its output closed and replaces it
            self.process.stdin.write(f"{number}\n".encode())

    def hear(self, wait_s: float = 0.0) -> SaveReport | None:
        """What became of the save in flight, or None while that is open.

        A writer that died is replaced and tries again: the buffer still holds the state.
        """
        deadline = time.monotonic() + wait_s
        while self.busy:
            assert self.process.stdout is not None
            if not select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                return None
            data, self._sign = os.read(self.process.stdout.fileno(), 1 << 16), time.monotonic()
            self._heard = (self._heard + data).lstrip(b"\n")  # an empty line is a sign of life
            if not data:
                self._replace()
            elif self._heard.endswith(b"\n"):
                report, self._heard, self._pending = SaveReport.model_validate_json(self._heard), b"", None
                return report
        return None

    def _replace(self) -> None:
        """Hand the same save to a new process; one that keeps killing its writer is refused."""
        assert self._pending is not None
        self._deaths += 1
        status = self._renew()
        again = self._pending
        if self._deaths >= DEATHS:
            again = again.model_copy(update={"refusal": f"its writer process died {self._deaths} times ({status})"})
        self._hand_over(again)
        if self._hurried:
            self.hurry()

    def give_up(self, reason: str) -> SaveReport:
        """Kill a writer that takes too long; on ranks whose vote is waited for, its successor says why."""
        request = self._pending
        assert request is not None
        self._renew()
        if request.state is None:
            self._hand_over(request.model_copy(update={"refusal": reason}))
            self.hear(CLOSE_S)
            if self.busy:  # the storage lets nobody write
                self._renew()
        self._pending = None
        return SaveReport(step=request.step, error=reason)

    def _renew(self) -> str:
        status = self._end()
        self._start()
        return status

    def _end(self) -> str:
        """Kill the process and say how it ended. One that waits for a dead disk cannot end, and is left behind."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            code = self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return "and does not end"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        """End the process and free the shared memory."""
        self._end()
        os.close(self._request)
        os.close(self._data)
