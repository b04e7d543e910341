"""A run's curves for TensorBoard, drawn from its events: training in `tensorboard/`, evaluations in `eval/` below it.

TensorBoard's server takes a step that is smaller than the one before as a restart and drops what it had from there on.
Evaluations end in any order, so theirs is a file of its own, written anew in step order whenever one ends.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainers.job.schema import Job
from trainers.run.events import (
    EvaluationEvent,
    Event,
    GoodputEvent,
    StartEvent,
    StepEvent,
    StragglerEvent,
    read_events,
)
from trainers.run.folder import read_evaluations
from trainers.run.scalars import scalars_of
from trainers.storage import Folder
from trainers.tasks import choose_metric

FIRST_NUMBER = 1_000_000
"""Of a process's writers: all numbers have as many digits."""
HYPERPARAMETERS = ("train", "model", "data", "scale")
"""Sections of the job whose numbers and words are shown as hyperparameters."""


class Curves:
    """The writers of `tensorboard/` in a run folder.

    Args:
        picture: a matplotlib figure of an evaluation by its step, or None if there is nothing to draw.
        job: for hyperparameters and the deciding metric.
    """

    def __init__(self, run: Folder, picture: Callable[[Folder, int], Any] | None, job: Job | None) -> None:
        self._run, self._picture, self._job = run, picture, job
        self._folder = run.path / "tensorboard"
        self._writer: Any = None
        told = [event for event in read_events(run) if isinstance(event, EvaluationEvent)]
        self._evaluations = {event.step: event for event in told if event.status == "done"}
        untold = [record for record in read_evaluations(run) if record.status == "done"]
        untold = [record for record in untold if record.step not in self._evaluations]
        if untold:  # they ended while no driver was alive
            self._evaluations |= {one.step: EvaluationEvent(step=one.step, metrics=one.metrics) for one in untold}
            self._draw_evaluations()

    def add(self, event: Event) -> None:
        """Draw an event, if it is one that has a curve."""
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent | GoodputEvent | StragglerEvent):
            self._scalars(event, scalars_of(event))
        elif isinstance(event, EvaluationEvent) and event.status == "done":
            self._evaluations[event.step] = event
            self._draw_evaluations()

    def _open(self, step: int) -> None:
        """After a restart, `purge_step` hides the points of steps that are done again."""
        self.close()
        self._writer = _open_writer(self._folder, purge_step=step + 1 if step else None)
        if self._job:
            self._writer.add_custom_scalars(_layout(choose_metric(self._job)[0]))

    def _scalars(self, event: StepEvent | GoodputEvent | StragglerEvent, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            self._open(0)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, event.step, walltime=event.time)
        self._writer.flush()

    def _draw_evaluations(self) -> None:
        """Write every evaluation in step order, then remove the file that lacks the newest."""
        from torch.utils.tensorboard.summary import hparams

        folder = self._folder / "eval"
        old = list(folder.glob("events.*")) if folder.exists() else []
        with _open_writer(folder) as writer:
            if self._job:
                for summary in hparams(_hyperparameters(self._job), {f"eval/{choose_metric(self._job)[0]}": 0.0}):
                    writer.file_writer.add_summary(summary)
            for step, event in sorted(self._evaluations.items()):
                for tag, value in scalars_of(event).items():
                    writer.add_scalar(tag, value, step, event.time)
                figure = self._picture(self._run, step) if self._picture else None
                if figure is not None:
                    writer.add_figure("eval/confusion", figure, step, walltime=event.time)
        for file in old:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()


def _open_writer(folder: Path, purge_step: int | None = None) -> Any:
    """A writer of a file whose name sorts behind those before it: TensorBoard reads files by name, which is the second,
    the process and then the number of the writer in its process, where 10 would stand before 9."""
    from tensorboard.summary.writer import event_file_writer
    from torch.utils.tensorboard import SummaryWriter

    if event_file_writer._global_uid._value < FIRST_NUMBER:
        event_file_writer._global_uid = event_file_writer.AtomicCounter(FIRST_NUMBER)
    return SummaryWriter(str(folder), purge_step=purge_step)


def _layout(metric: str) -> dict[str, Any]:
    """The page of custom scalars: what one looks at first."""
    return {
        "run": {
            "loss, training and evaluation": ["Multiline", ["train/loss", "eval/loss"]],
            f"{metric}, which decides": ["Multiline", [f"eval/{metric}"]],
            "learning rate": ["Multiline", ["train/learning_rate"]],
            "tokens a second": ["Multiline", ["speed/tokens_per_s"]],
        }
    }


def _hyperparameters(job: Job) -> dict[str, bool | float | str]:
    """What the job sets: with every default the page hides the learning rate behind forty names."""
    return {
        f"{section}.{name}": value
        for section in HYPERPARAMETERS
        for name, value in getattr(job, section).model_dump(mode="json", exclude_defaults=True).items()
        if isinstance(value, bool | int | float | str)
    }
