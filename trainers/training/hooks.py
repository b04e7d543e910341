"""What the loop needs from outside: the hooks it reports through, what saves, and what is minimized."""

from collections.abc import Mapping
from typing import Any, Protocol

from trainers.checkpoint.records import Progress
from trainers.records import Phase, StopReason
from trainers.run.events import Event


class Hooks(Protocol):
    """What a rank tells the outside world, and hears from it. Only rank 0's `emit` is called."""

    def emit(self, event: Event) -> None:
        """Record an event."""

    def stop_reason(self) -> StopReason | None:
        """Why to stop after this step, or None; cheap enough to ask many times a step."""

    def at(self, phase: Phase, step: int) -> None:
        """This rank enters a phase of step `step`, counted from 0."""


class Objective(Protocol):
    """What is minimized: a task, or one with a teacher."""

    def step_loss(self, model: Any, inputs: Mapping[str, Any], labels: Any, targets: Any) -> Any:
        """The loss of a micro-batch, summed over targets; their places as `Batch.targets` gives them."""


class Evaluate(Protocol):
    """Scores the state that is being saved, where the ranks evaluate."""

    def __call__(self, step: int) -> None:
        """Called by every rank, before the next update, with the number of steps done."""


class Saver(Protocol):
    """Writes checkpoints."""

    committed: int | None
    """On rank 0, the step that was committed last."""

    @property
    def reading(self) -> bool:
        """Whether a save still reads the state, which an update would change."""

    def save(self, progress: "Progress") -> None:
        """Begin to copy the state after `progress.step` steps, and to write the copy; called by every rank."""

    def before_update(self) -> None:
        """Wait until the copy is made."""

    def poll(self) -> None:
        """Tell of a commit that has happened since; does not wait."""

    def finish(self) -> None:
        """Wait until the save in flight is committed, or lost."""
