"""A job file as far as it can be read, so that one wrong value hides no other: what is wrong, and a job of the rest.

A wrong value gives way to its default, or to a stand-in where it has none; `Checks` passes over whatever would have
asked such a value, and says so.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainers.errors import DataError, JobError
from trainers.job.schema import Job

Found = TypeVar("Found")
STAND_INS: Mapping[str, Any] = {
    "name": "unnamed",
    "model": {"path": "."},
    "model.path": ".",
    "data": {"train": []},
    "data.train": [],
    "train": {"global_batch_size": 1, "learning_rate": 1.0},
    "train.global_batch_size": 1,
    "train.learning_rate": 1.0,
}
"""For fields without a default. None for `task`, on which nearly everything depends."""
ROUNDS = 4
"""A value that is taken out may leave another missing."""


@dataclass(frozen=True)
class Draft:
    """A job file that may be wrong."""

    job: Job | None
    """With a default or a stand-in at each broken place; None where no job can be made of it."""
    problems: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    """Places whose values are not the user's, such as data.train."""
    where: str = ""
    """What messages call it."""

    def require(self) -> Job:
        """The job. Raises JobError with every problem."""
        if self.problems or self.job is None:
            raise JobError(self.problems, self.where)
        return self.job


class Checks:
    """Runs checks, gathers their problems, and passes over those that need a broken value."""

    def __init__(self, draft: Draft) -> None:
        self.problems = list(draft.problems)
        self._draft = draft
        self._unchecked: list[str] = []
        self._refused: list[DataError] = []

    def __call__(self, what: str, needs: Sequence[str], check: Callable[[], Found]) -> Found | None:
        """What a check gives; None where it finds problems, or cannot be made.

        Args:
            what: it looks at, in the user's words.
            needs: places of the job file that it reads.
        """
        broken = [place for place in self._draft.broken if any(_touch(place, need) for need in needs)]
        if broken:
            self._unchecked.append(f"{what} ({', '.join(broken)})")
            return None
        try:
            return check()
        except JobError as error:
            self.problems += error.problems
        except DataError as error:
            self._refused.append(error)
        return None

    def require(self) -> None:
        """Raises what the checks found: a DataError alone as it is, else a JobError with every problem."""
        if self._refused and not self.problems and not self._unchecked:
            raise self._refused[0]
        problems = [*self.problems, *map(str, self._refused)]
        if problems:
            raise JobError(list(dict.fromkeys(problems)), self._draft.where, self._unchecked)


def make_job(raw: Mapping[str, Any], base: Path | None) -> tuple[Job | None, ValidationError | None, list[str]]:
    """A job of plain data.

    Args:
        base: the folder that relative paths are taken from; None leaves them.

    Returns:
        The job, None where none can be made; what is wrong with the fields; the broken places.
    """
    mended, broken = deepcopy(dict(raw)), dict[str, None]()
    first: ValidationError | None = None
    for _ in range(ROUNDS):
        try:
            return Job.model_validate(mended, context={"base": base}), first, list(broken)
        except ValidationError as error:
            first, details = first or error, error.errors()
        places = dict.fromkeys(_place(mended, detail) for detail in details)
        for keys in places:
            if not any(keys[:length] in places for length in range(1, len(keys))):
                place = _mend(mended, keys)
                if not place:
                    return None, first, list(broken)
                broken[place] = None
    return None, first, list(broken)


def _place(raw: Mapping[str, Any], detail: ErrorDetails) -> tuple[str, ...]:
    """Keys from the root to what is wrong; inside of a list, to the list."""
    keys: list[str] = []
    node: Any = raw
    for part in detail["loc"]:  # branches of unions stand in it too, which are no keys
        if isinstance(part, int) or not isinstance(node, dict):
            break
        if part in node or (detail["type"] == "missing" and part == detail["loc"][-1]):
            keys.append(part)
            node = node.get(part)
    return tuple(keys)


def _mend(raw: dict[str, Any], keys: Sequence[str]) -> str:
    """Put a default or a stand-in in the place of a wrong value; returns the place, "" where only the whole is left."""
    while keys:
        *above, key = keys
        place, parent = ".".join(keys), raw
        for each in above:
            if each not in parent:  # taken out with another of its values
                return place
            parent = parent[each]
        if place in STAND_INS:
            parent[key] = deepcopy(STAND_INS[place])
            return place
        if key in parent:
            del parent[key]
            return place
        keys = above  # missing, and nothing can stand in: the section as a whole
    return ""


def _touch(one: str, other: str) -> bool:
    """Whether one place lies in the other."""
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")
