"""What is wrong with the fields of a job file, in words that a user can act on."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainers.job.schema import Job
from trainers.job.sections import SECRET

BRANCHES = ("Elastic", "int", "constrained-int", "str", "SourceSection")
"""Names that pydantic puts into a location for the branch of a union; no key of ours."""
RENAMED = {"several_labels": "multi_label"}
"""Keys of earlier versions."""


def explain(error: ValidationError | None, root: type[BaseModel] = Job) -> list[str]:
    """A line that a user can act on for each thing that is wrong with the fields of `root`; none without an error."""
    return [_explain(detail, root) for detail in error.errors() if not _other_branch(detail)] if error else []


def meant(error: ValidationError | None) -> list[str]:
    """Places of a job file that unknown keys were probably meant for."""
    unknown = [_location(one) for one in error.errors() if one["type"] == "extra_forbidden"] if error else []
    return [
        ".".join([*section, near]) for *section, key in unknown for near in _nearest(key, _known_keys(section, Job))
    ]


def _location(detail: ErrorDetails) -> list[str]:
    return [str(part) for part in detail["loc"] if part not in BRANCHES and "[" not in str(part)]


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.5)


def _explain(detail: ErrorDetails, root: type[BaseModel]) -> str:
    location = _location(detail)
    where = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return unknown_key(where, location[-1], _known_keys(location[:-1], root))
    if detail["type"] == "missing":
        return f"{where}: required, and missing"
    if detail["type"] == SECRET:
        return f"{where}: {detail['msg']}"
    rule = detail["msg"].replace("Input should be", "must be", 1).replace("a valid tuple", "a list")
    return f"{where}: {rule}, got {detail['input']!r}"


def unknown_key(where: str, key: str, known: Sequence[str]) -> str:
    """What to say of a key that is not known, with the nearest that is."""
    near = _nearest(key, known)
    if key in RENAMED and RENAMED[key] in known:
        return f"{where}: this key is called {RENAMED[key]} now"
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{where}: unknown key; {hint}"


def _known_keys(location: Sequence[str], model: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options: tuple[Any, ...] = (annotation, *get_args(annotation))
        nested = [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _other_branch(detail: ErrorDetails) -> bool:
    """Whether this error is about the branch of a union that the value was not meant for."""
    shape: dict[str, Any] = {
        "int_type": dict,
        "model_type": (int, str, float),
        "string_type": dict,
        "literal_error": int,
    }
    in_union = any(str(part) in BRANCHES or "[" in str(part) for part in detail["loc"])
    return in_union and isinstance(detail["input"], shape.get(detail["type"], ()))
