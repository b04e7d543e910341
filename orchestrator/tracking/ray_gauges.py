"""A run's progress among Ray's own metrics, which every node offers to Prometheus; `docs/operating.md` lists them.

Ray adds `ray_` to each name. Knows nothing of who collects them: without a collector a value costs a few microseconds.
"""

from typing import Any

from trainers.run.events import CheckpointEvent, EvaluationEvent, Event, RestartEvent, StartEvent, StepEvent

GAUGES = {
    "tuneyard_step": "Optimizer steps that are done.",
    "tuneyard_steps": "Optimizer steps of the whole run.",
    "tuneyard_workers": "Ranks that train.",
    "tuneyard_loss": "Loss of the newest step.",
    "tuneyard_learning_rate": "Learning rate of the newest step.",
    "tuneyard_tokens_per_second": "Tokens a second over all ranks.",
    "tuneyard_checkpoint_step": "Step of the newest committed checkpoint.",
    "tuneyard_restarts": "Restarts since this driver began.",
    "tuneyard_evaluation": "Newest value of each metric of the evaluation set, without those by class.",
}


class RayGauges:
    """Sets a run's gauges as its events come; Ray must be running."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        tags = {name: ("run", "metric") if name == "tuneyard_evaluation" else ("run",) for name in GAUGES}
        self._gauges: dict[str, Any] = {name: Gauge(name, GAUGES[name], tag_keys=tags[name]) for name in GAUGES}
        self._run, self._restarts = run, 0

    def on_event(self, event: Event) -> None:
        """Take over what an event tells."""
        values: dict[str, float | None] = {}
        if isinstance(event, StepEvent):
            values = {"step": event.step, "loss": event.loss, "learning_rate": event.learning_rate,
                      "tokens_per_second": event.tokens_per_s}  # fmt: skip
        elif isinstance(event, StartEvent):
            values = {"steps": event.steps, "workers": event.world_size}
        elif isinstance(event, CheckpointEvent):
            values = {"checkpoint_step": event.step}
        elif isinstance(event, RestartEvent):
            self._restarts += 1
            values = {"restarts": self._restarts}
        elif isinstance(event, EvaluationEvent):
            for metric, number in event.metrics.items():
                if "/" not in metric:
                    self._gauges["tuneyard_evaluation"].set(number, tags={"run": self._run, "metric": metric})
        for name, value in values.items():
            if value is not None:
                self._gauges[f"tuneyard_{name}"].set(value, tags={"run": self._run})
