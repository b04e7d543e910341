"""What a sweep varies and how, from a sweep file or from `--set-grid`; every problem is said before anything starts."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from trainers.errors import JobError
from trainers.job.explain import explain
from trainers.job.load import load_job, parse_yaml, read_yaml
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.continued import is_changeable, refusal

FIXED = ("name", "storage", "task", "registry", "evaluate.metric", "evaluate.mode", "data.eval", "data.eval_fraction",
         "checkpoint.storage")  # fmt: skip
"""Fields that name, judge or place the runs of a sweep: with other values they would not be compared."""
MOST_TRIALS = 10_000


class Range(Record):
    """Numbers between two bounds, bounds included; whole ones where both bounds are."""

    low: int | float
    high: int | float
    log: bool = False
    """Drawn evenly by magnitude."""


class SweepSpec(Record):
    """A sweep file."""

    job: str
    """Path of the job file, from the sweep file's folder."""
    space: dict[str, tuple[Any, ...] | Range]
    """A job's fields, each with its values or its range."""
    method: Literal["grid", "random", "tpe", "population"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    """How many to draw; for a grid all; for population its members."""
    seed: int = 0
    halving: Annotated[int, Field(ge=2)] | None = None
    """Successive halving (ASHA): of so many trials one goes on at each pause; null trains each to its end."""
    pauses: Annotated[int, Field(ge=1)] | None = None
    """At most so many, the late ones; null: as many as leave one trial."""

    generations: Annotated[int, Field(ge=2)] | None = None
    """population: stretches of the training; between two of them the worst members copy the best."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """population: the share of the members that copies, and of those that are copied."""

    def digest(self) -> str:
        """Of all that makes the sweep but for where its job file lies."""
        alone = set() if self.method == "population" else {"generations", "quantile"}
        return hashlib.sha256(self.model_dump_json(exclude={"job", *alone}).encode()).hexdigest()


def read_spec(path: Path, grids: Sequence[str], halving: int | None) -> SweepSpec:
    """A sweep file, or a job file with `field=value,value` grids. Raises JobError with every problem."""
    raw = read_yaml(path)
    is_sweep = "space" in raw or "job" in raw
    if not is_sweep and not grids:
        raise JobError("nothing to vary: add --set-grid section.key=value,value to a job file, or name a sweep file "
                       "with job: and space:", str(path))  # fmt: skip
    if not is_sweep:
        return SweepSpec(job=str(path), space=_read_grids(grids), halving=halving)
    if grids or halving:
        raise JobError("a sweep file says what is varied; leave out --set-grid and --halving", str(path))
    problems = _space_problems(raw)
    try:
        spec = SweepSpec.model_validate(raw)
    except ValidationError as error:
        said = [line for line in explain(error, SweepSpec) if not line.startswith("space.")]
        raise JobError([*problems, *said], str(path)) from None
    if spec.method != "grid" and spec.trials is None:
        problems.append(f"trials: {spec.method} needs to know how many to draw")
    if spec.method == "grid" and spec.trials is not None:
        problems.append("trials: a grid has all its points; leave trials out, or choose method: random or tpe")
    problems += _population_problems(spec, raw)
    if spec.pauses is not None and spec.halving is None:
        problems.append("pauses: trials pause for halving alone; say how many there are to one that goes on")
    if problems:
        raise JobError(problems, str(path))
    return spec.model_copy(update={"job": str(path.absolute().parent / spec.job)})


def _population_problems(spec: SweepSpec, raw: Mapping[str, Any]) -> list[str]:
    """What only population-based training needs, or cannot have."""
    if spec.method != "population":
        return [f"{name}: for method: population alone; leave it out"
                for name in ("generations", "quantile") if raw.get(name) is not None]  # fmt: skip
    fixed = {field: refusal(field) or "it says how long it is" for field in spec.space if not is_changeable(field)}
    problems = [f"space.{field}: cannot change within a training ({why}); give it in the job, or choose method: random"
                for field, why in fixed.items()]  # fmt: skip
    if spec.generations is None:
        problems.append("generations: population needs to know how many, 2 or more")
    if spec.trials is not None and spec.trials < 2:
        problems.append("trials: of one member nobody copies; give 2 or more")
    if spec.halving is not None:
        problems.append("halving: population stops nobody; leave halving out, or choose method: random")
    return problems


def _read_grids(grids: Sequence[str]) -> dict[str, tuple[Any, ...] | Range]:
    space: dict[str, tuple[Any, ...] | Range] = {}
    problems = []
    for item in grids:
        field, equals, text = item.partition("=")
        field = field.strip()
        try:
            values = parse_yaml(f"[{text}]")
        except yaml.YAMLError:
            values = None
        if not equals or not field or not isinstance(values, list):
            problems.append(f"{item!r} is not of the form section.key=value,value")
        elif field in space:
            problems.append(f"{field} stands twice; give all its values in one --set-grid")
        else:
            space[field] = tuple(values)
            problems += _field_problems(field, values, "grid")
    if problems:
        raise JobError(problems, "--set-grid")
    return space


def _space_problems(raw: Mapping[str, Any]) -> list[str]:
    space, method = raw.get("space"), raw.get("method", "grid")
    if not isinstance(space, dict) or not space:
        return ["space: name at least one field of the job, with its values or {low, high}"] if "space" in raw else []
    return [f"space.{problem}" for field, given in space.items() for problem in _field_problems(field, given, method)]


def _field_problems(field: Any, given: Any, method: str) -> list[str]:
    fixed = next((name for name in FIXED if field == name or str(field).startswith(f"{name}.")), None)
    if fixed:
        return [f"{field}: {fixed} is the same for all runs of a sweep"]
    if not isinstance(field, str) or "." not in field:
        return [f"{field}: name a single field, as section.key"]
    if isinstance(given, list):
        texts = [json.dumps(value, sort_keys=True, default=str) for value in given]
        double = sorted({text for text in texts if texts.count(text) > 1})
        if not given:
            return [f"{field}: no values"]
        return [f"{field}: {', '.join(double)} stands twice"] if double else []
    if not isinstance(given, dict):
        return [f"{field}: give a list of values, or {{low, high}}"]
    return _range_problems(field, given, method)


def _range_problems(field: str, given: dict[str, Any], method: str) -> list[str]:
    try:
        bounds = Range.model_validate(given, strict=True)
    except ValidationError as error:
        return [f"{field}.{line}" for line in explain(error, Range)]
    if not -math.inf < bounds.low < bounds.high < math.inf:
        return [f"{field}: low ({bounds.low}) must lie below high ({bounds.high})"]
    if bounds.log and bounds.low <= 0:
        return [f"{field}: log needs a low above 0, got {bounds.low}"]
    if method == "grid":
        return [f"{field}: a grid needs a list of values; ranges are for method: random, tpe and population"]
    return []


def trial_job(spec: SweepSpec, overrides: Sequence[str], values: Mapping[str, Any]) -> Job:
    """The job with a trial's values. Raises JobError."""
    return load_job(spec.job, [*overrides, *(f"{field}={json.dumps(value)}" for field, value in values.items())])


def told(values: Mapping[str, Any]) -> str:
    """A trial's values as a person writes them."""
    return ", ".join(f"{field}={value}" for field, value in values.items())
