"""What is said at a field of the job file, beside its type: tasks that it is for, whether it shapes shards, whether it
names a path. Whoever treats fields apart reads it there, so a new field is entered once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from trainers.storage import is_remote

PACKING_TASKS = ("pretrain", "sft")
SPLITTING_TASKS = ("pretrain", "mlm", "extract")
"""Tasks that can use a row in several pieces, and do unless told otherwise."""
TOKEN_TASKS = ("pretrain", "mlm", "sft", "seq2seq", "classify", "tag")
"""Tasks whose loss is a cross entropy over classes, so that it can be smoothed and distilled."""
PROMPT_FIELDS = ("source", "source_language", "target_language")
"""Fields of a seq2seq row that `data.prompt` may hold in braces."""
PLACE = re.compile(r"\{(\w+)\}")
"""A field in a prompt."""


class For:
    """Stands in the annotation of a field that means something to some tasks only; given to another it is refused."""

    def __init__(self, *tasks: str, shapes_shards: bool = False) -> None:
        self.tasks = tasks
        self.shapes_shards = shapes_shards
        """Whether it decides how a row is written down, so that it is a part of the shards' key."""


def path_if(is_path: Callable[[str, Path], bool]) -> BeforeValidator:
    """Stands in the annotation of a field whose values are paths where `is_path(value, folder)`.

    Relative ones are taken from the folder in the validation context, `base`; without one they stay as they are.
    """

    def absolute(value: Any, info: ValidationInfo) -> Any:
        base = (info.context or {}).get("base")
        if base is None or not isinstance(value, str) or is_remote(value) or not is_path(value, base):
            return value
        return str((base / Path(value.removeprefix("file://")).expanduser()).resolve())

    return BeforeValidator(absolute)


def names_folder(path: str, base: Path = Path()) -> bool:
    """Whether `model.path` means a folder: it exists as one, or does not have the form of a hub id."""
    return (base / Path(path).expanduser()).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)


AnyPath = Annotated[str, path_if(lambda value, base: True)]
ModelPath = Annotated[str, path_if(names_folder)]
"""A folder, or a hub id, which stays as it is."""
