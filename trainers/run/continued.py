"""A run that begins from another run's checkpoint: what it may change, and the line of runs that it comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

from trainers.job.schema import Job
from trainers.records import Record
from trainers.storage import Folder

CONTINUED = "continued.json"
CHANGEABLE = ("train.learning_rate", "train.schedule", "train.warmup_ratio", "train.weight_decay",
              "train.max_grad_norm", "train.spike_factor", "train.layer_decay", "train.label_smoothing",
              "train.class_weights", "train.neftune_alpha", "train.distill.alpha",
              "train.distill.temperature", "model.dropout",
              "model.lora.dropout")  # fmt: skip
"""Fields of a training that may have another value from a step on: weights, moments and rows of the steps before mean
the same under every value."""
LENGTH = ("train.epochs", "train.steps", "train.continue_from")
"""May differ as well: they say how far a run goes and where it begins."""
ROWS = ("task", "data", "train.seed", "train.global_batch_size")
"""What decides which rows a step has."""


class Ancestor(Record):
    """A run that trained a stretch of steps for those after it in the line."""

    run: str
    """Name of its run folder."""
    step: int
    """The last of its steps that counts: the next in the line goes on from there."""
    digest: str
    """xxh3-128 of that checkpoint's manifest, which holds the digest of each of its files."""
    changed: dict[str, tuple[Any, Any]]
    """Fields that the next in the line has otherwise: the value up to `step`, and the one after it."""


class Line(Record):
    """continued.json: where a run comes from, the oldest first."""

    schema_version: int = 1
    ancestors: tuple[Ancestor, ...]


def read_line(run: Folder) -> tuple[Ancestor, ...]:
    """The runs that a run comes from, the oldest first; none where it began from a model."""
    try:
        return Line.model_validate_json(run.read_bytes(CONTINUED)).ancestors
    except FileNotFoundError:
        return ()


def told_line(ancestors: tuple[Ancestor, ...]) -> list[str]:
    """The line as a person reads it: a sentence a run."""
    first, told = 1, []
    for one in ancestors:
        values = ", ".join(f"{field} {before} -> {after}" for field, (before, after) in one.changed.items())
        told.append(f"steps {first}-{one.step}: {one.run} ({one.digest}); then {values or 'nothing changed'}")
        first = one.step + 1
    return told


def changed_fields(before: Job, after: Job) -> dict[str, tuple[Any, Any]]:
    """What two jobs have otherwise, of all that counts for the trained weights, by field."""
    parts = []
    for job in (before, after):
        counted = job.counted()
        del counted["evaluate"]
        counted["train"].pop("continue_from", None)
        parts.append(counted)
    return dict(_differences(parts[0], parts[1]))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{at}{key}.")
        elif was != now:
            yield f"{at}{key}", (was, now)


def refusal(field: str) -> str | None:
    """Why a field cannot change in the middle of a training; None where it can."""
    if _within(field, CHANGEABLE + LENGTH):
        return None
    if _within(field, ROWS):
        return "it decides which rows a step has, so those of the steps before would be told wrong"
    return "the weights and moments of the checkpoint are of the training that had it"


def is_changeable(field: str) -> bool:
    """Whether a field may have another value from a step on, the training being as long as before."""
    return _within(field, CHANGEABLE)


def _within(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
