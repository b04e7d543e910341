"""The run's own record: appends events to events.jsonl and, where the job wants it, draws TensorBoard's curves.

One process owns it: the controller under Ray, rank 0 without.
"""

from collections.abc import Callable
from typing import Any

from trainers.job.schema import Job
from trainers.run.events import EVENTS, Event, HistoryEvent, StepEvent, read_events
from trainers.run.tensorboard import Curves
from trainers.storage import Folder


class RunLog:
    """Appends events to a run folder; both files are readable at any moment.

    Args:
        picture, job: see `trainers.run.tensorboard.Curves`.
    """

    def __init__(
        self, run: Folder, picture: Callable[[Folder, int], Any] | None = None, job: Job | None = None
    ) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        self._stream = (run.path / EVENTS).open("a+b")
        if self._stream.tell():  # end a line that a killed process left open
            self._stream.seek(-1, 2)
            if self._stream.read(1) != b"\n":
                self._stream.write(b"\n")
        self._steps = {event.step for event in read_events(run) if isinstance(event, StepEvent)}
        shown = job is None or "tensorboard" in job.report_to
        self._curves = Curves(run, picture, job) if shown else None

    def append(self, event: Event) -> None:
        """Record one event; of a history, the steps that are not in the log."""
        if isinstance(event, HistoryEvent):
            for missed in event.events:
                if missed.step not in self._steps:
                    self.append(missed)
            return
        if isinstance(event, StepEvent):
            self._steps.add(event.step)
        self._stream.write(event.model_dump_json().encode() + b"\n")
        self._stream.flush()
        if self._curves:
            self._curves.add(event)

    def close(self) -> None:
        """Flush both files."""
        self._stream.close()
        if self._curves:
            self._curves.close()
