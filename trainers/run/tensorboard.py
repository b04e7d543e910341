"""A run's curves for TensorBoard, drawn from its events."""

from collections.abc import Callable, Mapping
from typing import Any

from trainers.run.events import EvaluationEvent, Event, GoodputEvent, StartEvent, StepEvent, StragglerEvent
from trainers.storage import Folder

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


class Curves:
    """The writer of `tensorboard/` in a run folder."""

    def __init__(self, run: Folder, picture: Callable[[Folder, int], Any] | None) -> None:
        self._run, self._picture = run, picture
        self._writer: Any = None

    def add(self, event: Event) -> None:
        """Draw an event, if it is one that has a curve."""
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent):
            values = {tag: getattr(event, field) for field, tag in STEP_SCALARS.items()}
            self._scalars(event, {tag: value for tag, value in values.items() if value is not None})
        elif isinstance(event, GoodputEvent):
            values = event.values()
            self._scalars(event, {f"goodput/{name}": values[name] for name in values.keys() - {"step"}})
        elif isinstance(event, StragglerEvent):
            self._scalars(event, {"straggler/rank": event.rank, "straggler/lag_s": event.lag_s})
        elif isinstance(event, EvaluationEvent):
            self._scalars(event, {f"eval/{name}": value for name, value in event.metrics.items()})
            figure = self._picture(self._run, event.step) if self._picture else None
            if figure is not None:
                self._writer.add_figure("eval/confusion", figure, event.step, walltime=event.time)
                self._writer.flush()

    def _open(self, step: int) -> None:
        """After a restart, `purge_step` hides the points of steps that are done again."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def _scalars(
        self, event: StepEvent | GoodputEvent | StragglerEvent | EvaluationEvent, scalars: Mapping[str, float]
    ) -> None:
        if self._writer is None:
            self._open(0)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, event.step, walltime=event.time)
        self._writer.flush()

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()
