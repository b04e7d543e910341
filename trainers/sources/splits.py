"""Folders that hold several splits, so that naming one for training would train on its test rows too."""

import re
from collections.abc import Sequence

from trainers.errors import JobError

RECORD = "dataset_dict.json"
"""What `datasets` writes beside several splits that it saves."""
OF_TRAINING = re.compile(r"(?:^|[/_.-])train(?:ing)?(?=[/_.\d-]|$)", re.IGNORECASE)
HELD_OUT = re.compile(r"(?:^|[/_.-])(?:test|dev|val|valid|validation|eval)(?=[/_.\d-]|$)", re.IGNORECASE)


def check_one_split(pattern: str, paths: Sequence[str]) -> None:
    """Look at the names in a folder.

    Args:
        pattern: the folder, as the job names it.
        paths: its files, relative to it.

    Raises:
        JobError: where some are of a training set and others of one that is held out.
    """
    if any(path.rpartition("/")[2] == RECORD for path in paths):
        example = f"{pattern.rstrip('/')}/train"
        raise JobError(
            f"{pattern}: `datasets` has saved several splits here; name the folder of one, such as {example}"
        )
    training = [path for path in paths if OF_TRAINING.search(path) and not HELD_OUT.search(path)]
    held_out = [path for path in paths if HELD_OUT.search(path) and not OF_TRAINING.search(path)]
    if training and held_out:
        raise JobError(
            f"{pattern}: the folder holds files of several splits ({training[0]}, {held_out[0]}); name those that are "
            f"meant, such as {pattern.rstrip('/')}/{training[0]}, or a glob"
        )
