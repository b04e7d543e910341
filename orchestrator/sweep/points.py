"""Which values the trials of a sweep get. Pure: the same spec and the same trials give the same values."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from orchestrator.sweep.spec import MOST_TRIALS, Range, SweepSpec
from trainers.errors import JobError


def first_points(spec: SweepSpec) -> list[dict[str, Any]]:
    """The values of all trials that are known from the start; none for tpe, which learns from the others.

    Raises:
        JobError: more than anybody can want.
    """
    if spec.method == "grid":
        values = [given if isinstance(given, tuple) else () for given in spec.space.values()]
        count = math.prod(map(len, values))
        if count > MOST_TRIALS:
            raise JobError(f"the grid has {count:,} points; at most {MOST_TRIALS:,} are tried")
        return [dict(zip(spec.space, point, strict=True)) for point in itertools.product(*values)]
    if spec.method in ("random", "population"):
        return _drawn(spec)
    return []


def extreme_points(spec: SweepSpec) -> list[dict[str, Any]]:
    """Points that hold every value and every bound once, for checks before any trial of tpe."""
    ends = {field: list(given) if isinstance(given, tuple) else [given.low, given.high]
            for field, given in spec.space.items()}  # fmt: skip
    most = max(map(len, ends.values()))
    return [{field: values[number % len(values)] for field, values in ends.items()} for number in range(most)]


def _drawn(spec: SweepSpec) -> list[dict[str, Any]]:
    """Distinct points; fewer than asked for where the space has no more."""
    points: list[dict[str, Any]] = []
    for number in range(20 * (spec.trials or 0)):
        dice = random.Random(f"{spec.seed}/{number}")
        point = {field: draw(given, dice) for field, given in spec.space.items()}
        if point not in points:
            points.append(point)
        if len(points) == spec.trials:
            break
    return points


def draw(given: Sequence[Any] | Range, dice: random.Random) -> Any:
    """One value."""
    if not isinstance(given, Range):
        return dice.choice(given)
    low, high = (math.log(given.low), math.log(given.high)) if given.log else (given.low, given.high)
    if isinstance(given.low, int) and isinstance(given.high, int) and not given.log:
        return dice.randint(given.low, given.high)
    value = dice.uniform(low, high)
    return in_range(math.exp(value) if given.log else value, given)


def in_range(value: float, given: Range) -> int | float:
    """A number as a person would write it: four digits, within the bounds, whole where they are."""
    if isinstance(given.low, int) and isinstance(given.high, int):
        return min(max(round(value), given.low), given.high)
    return min(max(float(f"{value:.4g}"), given.low), given.high)
