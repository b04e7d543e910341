"""What an event gives to curves: numbers by name at a step, the same for TensorBoard, MLflow and Weights & Biases."""

from trainers.run.events import EvaluationEvent, Event, GoodputEvent, StepEvent, StragglerEvent

STEP_SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s",
    "data_wait_s": "speed/data_wait_s",
    "memory_gib": "memory/peak_gib",
}
"""Field of a step event: name of its curve."""


def scalars_of(event: Event) -> dict[str, float]:
    """The points of an event, at its `step`; none where it has no curve."""
    if isinstance(event, StepEvent):
        values = {name: getattr(event, field) for field, name in STEP_SCALARS.items()}
        return {name: float(value) for name, value in values.items() if value is not None}
    if isinstance(event, GoodputEvent):
        return {f"goodput/{name}": value for name, value in event.values().items() if name != "step"}
    if isinstance(event, StragglerEvent):
        return {"straggler/rank": event.rank, "straggler/lag_s": event.lag_s}
    if isinstance(event, EvaluationEvent) and event.status == "done":
        return {f"{'per_class' if '/' in name else 'eval'}/{name}": value for name, value in event.metrics.items()}
    return {}
