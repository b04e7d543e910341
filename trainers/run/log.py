"""The run's own record: events.jsonl, and the same numbers for TensorBoard.

One process owns it: the controller under Ray, rank 0 without. Events are flat dictionaries with `kind` and `time`:
history, verification, start, step, straggler, checkpoint, checkpoint_skipped, checkpoint_quarantined, rolled_back,
hang, restart, evaluation, stage_start, stage, goodput, done. A checkpoint's event comes after its commit, which later
steps may precede; its `step` says whose it is.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from trainers.storage import Folder

EVENTS = "events.jsonl"
STEP_SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s",
    "data_wait_s": "speed/data_wait_s",
    "memory_gib": "memory/peak_gib",
}
"""Event field: TensorBoard tag."""


class RunLog:
    """Appends events to a run folder; both files are readable at any moment."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._writer: Any = None
        run.path.mkdir(parents=True, exist_ok=True)
        self._stream = (run.path / EVENTS).open("a", encoding="utf-8")
        self._repair()
        self._steps = {event["step"] for event in read_events(run) if event["kind"] == "step"}

    def _repair(self) -> None:
        """End a line that a killed process left open."""
        path = self._run.path / EVENTS
        size = path.stat().st_size
        if size:
            with path.open("rb") as stream:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":
                    self._stream.write("\n")

    def append(self, event: Mapping[str, Any]) -> None:
        """Record one event. A history gives the steps among it that were never heard of."""
        event = {"time": time.time(), **event}
        if event["kind"] == "history":
            for missed in event["events"]:
                if missed["step"] not in self._steps:
                    self.append(missed)
            return
        if event["kind"] == "step":
            self._steps.add(event["step"])
        self._stream.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._stream.flush()
        if event["kind"] == "start":
            self._open_tensorboard(int(event["step"]))
        elif event["kind"] == "step":
            self._scalars(event, {tag: event[field] for field, tag in STEP_SCALARS.items() if field in event})
        elif event["kind"] == "goodput":
            self._scalars(event, {f"goodput/{name}": event[name] for name in event.keys() - {"kind", "time", "step"}})
        elif event["kind"] == "straggler":
            self._scalars(event, {"straggler/rank": event["rank"], "straggler/lag_s": event["lag_s"]})
        elif event["kind"] == "evaluation":
            self._scalars(event, {f"eval/{name}": value for name, value in event["metrics"].items()})
            self._picture(int(event["step"]), event["time"])

    def _open_tensorboard(self, step: int) -> None:
        """After a restart, `purge_step` hides the points of steps that are done again."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def _scalars(self, event: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            self._open_tensorboard(0)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, event["step"], walltime=event["time"])
        self._writer.flush()

    def _picture(self, step: int, walltime: float) -> None:
        """The confusion matrix of a classification, where the evaluation left its rows."""
        from trainers.evaluation.confusion import draw_confusion

        figure = draw_confusion(self._run, step)
        if figure is not None:
            self._writer.add_figure("eval/confusion", figure, step, walltime=walltime)
            self._writer.flush()

    def close(self) -> None:
        """Flush both files."""
        self._stream.close()
        if self._writer is not None:
            self._writer.close()


def read_events(run: Folder) -> list[dict[str, Any]]:
    """Every event of a run, oldest first; a line that a kill cut short is left out."""
    try:
        lines = run.read_bytes(EVENTS).splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
