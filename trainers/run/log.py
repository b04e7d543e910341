"""The run's own record: appends events to events.jsonl and, where the job wants it, draws TensorBoard's curves.

One process owns it: the controller under Ray, rank 0 without. Storage that fails for a while does not end a run for it.
"""

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from trainers.job.schema import Job
from trainers.patience import retrying
from trainers.run.events import EVENTS, Event, HistoryEvent, StepEvent, read_events
from trainers.run.tensorboard import Curves
from trainers.storage import Folder

logger = logging.getLogger(__name__)
CURVES_PAUSE_S = 60.0
"""From curves that could not be drawn to the next try, with a file of its own."""


class RunLog:
    """Appends events to a run folder; both files are readable at any moment.

    Args:
        picture, job: see `trainers.run.tensorboard.Curves`.
        say: takes a line for the user.
    """

    def __init__(
        self,
        run: Folder,
        picture: Callable[[Folder, int], Any] | None = None,
        job: Job | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        self._path, self._say = run.path / EVENTS, say
        self._stream = self._path.open("a+b", buffering=0)  # so that it is known how much of a line was written
        self._unwritten, self._failed = bytearray(), ""
        if self._stream.tell():  # end a line that a killed process left open
            self._stream.seek(-1, 2)
            if self._stream.read(1) != b"\n":
                self._unwritten += b"\n"
        self._steps = {event.step for event in read_events(run) if isinstance(event, StepEvent)}
        self._make_curves = partial(Curves, run, picture, job)
        self._shown = job is None or "tensorboard" in job.report_to
        self._curves: Curves | None = None
        self._draw_again_at, self._undrawn = 0.0, False
        self._draw(None)

    def append(self, event: Event) -> None:
        """Record one event; of a history, the steps that are not in the log. What storage does not take now is written
        with a later event."""
        if isinstance(event, HistoryEvent):
            for missed in event.events:
                if missed.step not in self._steps:
                    self.append(missed)
            return
        if isinstance(event, StepEvent):
            self._steps.add(event.step)
        self._unwritten += event.model_dump_json().encode() + b"\n"
        try:
            self._write()
            self._failed = ""
        except OSError as error:
            if not self._failed:
                self._failed = f"{error.strerror or error}"
                self._say(f"{self._path} cannot be written now ({self._failed}): its lines are kept and tried again")
        self._draw(event)

    def _write(self) -> None:
        try:
            while self._unwritten:
                del self._unwritten[: self._stream.write(self._unwritten) or 0]
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS knows this handle no more
                before, self._stream = self._stream, self._path.open("a+b", buffering=0)
                with suppress(OSError):
                    before.close()
            raise

    def _draw(self, event: Event | None) -> None:
        """Curves are drawn from what events.jsonl holds: where they cannot be, the run goes on without them."""
        if not self._shown or time.monotonic() < self._draw_again_at:
            return
        try:
            if self._curves is None:
                self._curves = self._make_curves()
            if event is not None:
                self._curves.add(event)
        except Exception as error:  # whatever TensorBoard makes of it
            self._draw_again_at = time.monotonic() + CURVES_PAUSE_S
            self._close_curves()
            self._tell_undrawn(error)

    def _tell_undrawn(self, error: Exception) -> None:
        if not self._undrawn:
            self._undrawn = True
            self._say(f"TensorBoard's curves cannot be written now ({type(error).__name__}: {error}): they will have a "
                      f"gap; {self._path.name} has every value")  # fmt: skip

    def _close_curves(self) -> None:
        curves, self._curves = self._curves, None
        try:
            if curves:
                curves.close()
        except Exception as error:
            self._tell_undrawn(error)

    def settle(self) -> None:
        """Have every line written, waiting for storage. Raises OSError, with what is missing, where it does not come
        back."""
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            retrying(self._write, f"writing the last {lines} lines of {self._path}")

    def give_up(self) -> int:
        """Leave what could not be written: the run ends for another cause, which is to be told. Returns the lines."""
        lines = self._unwritten.count(b"\n")
        self._unwritten.clear()
        return lines

    def close(self) -> None:
        """Flush both files. Raises OSError as `settle` does, once."""
        try:
            self.settle()
        finally:
            self._unwritten.clear()
            self._stream.close()
            self._close_curves()
