"""Removes checkpoints that may go, and what killed launches left among them. One owner's work each."""

import shutil

from trainers.checkpoint.reading import quarantine
from trainers.checkpoint.records import COMMITTED, MANIFEST
from trainers.run.folder import parse_step, step_name
from trainers.storage import TEMPORARY, Folder


def remove_checkpoint(checkpoints: Folder, step: int) -> None:
    """Delete a checkpoint; killed in the middle, it leaves nothing that looks like one."""
    folder = checkpoints / step_name(step)
    if folder.is_local:
        doomed = folder.path.with_name(f"{TEMPORARY}{folder.name}")
        folder.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        folder.delete(COMMITTED)
        folder.delete()


def clean_leftovers(checkpoints: Folder) -> list[tuple[int, str]]:
    """Remove step folders that were never committed, and temporary files everywhere.

    A folder with a manifest but no marker is set aside instead: the marker may have been lost after the commit.

    Returns:
        step and reason of each checkpoint that is none, oldest first.
    """
    told = []
    for name in checkpoints.list():
        step = parse_step(name)
        if step is None or (checkpoints / name).exists(COMMITTED):
            continue
        if (checkpoints / name).exists(MANIFEST):
            told.append((step, f"its {COMMITTED} is missing; set aside"))
            quarantine(checkpoints, step, told[-1][1])
        else:
            told.append((step, "never committed: the run ended while it was being written; removed"))
            checkpoints.delete(name)
    _clean_temporary(checkpoints)
    return told


def _clean_temporary(checkpoints: Folder) -> None:
    """Files that a killed writer had not named yet; a bucket holds none, since an upload appears when it is whole."""
    if not checkpoints.is_local:
        return
    for path in (*checkpoints.path.glob(f"{TEMPORARY}*"), *checkpoints.path.glob(f"*/{TEMPORARY}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
