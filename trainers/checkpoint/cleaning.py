"""Removes checkpoints that may go, sets damaged ones aside, and clears what killed launches left. One owner's work."""

import contextlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa
import xxhash

from trainers.checkpoint.records import COMMITTED, MANIFEST, QUARANTINED, CheckpointManifest
from trainers.patience import VIEW_POLL_S, retrying, view_delay_s
from trainers.run.events import CheckpointEvent, CheckpointSkippedEvent
from trainers.run.folder import parse_step, step_name
from trainers.storage import TEMPORARY, Folder

log = logging.getLogger(__name__)
STORAGE_ERRORS = (OSError, pa.ArrowException)
"""pyarrow raises the second for a gs:// that does not answer."""
ASIDE, REMOVAL = "damaged-", "remove-checkpoint"


def remove_checkpoint(checkpoints: Folder, step: int) -> bool:
    """Take a checkpoint out of sight at once and delete it in a thread.

    Killed in the middle, it leaves nothing that looks like a checkpoint. One that is gone already is no error.

    Returns:
        False where storage does not do it now: the owner, or a later start, tries again.
    """
    folder = checkpoints / step_name(step)
    try:
        delete = take_away(folder)
    except STORAGE_ERRORS as error:
        if folder.is_local and isinstance(error, FileNotFoundError):
            return True
        log.warning(f"{folder} cannot be removed now, which is tried again: {error}")
        return False
    _beside(delete)
    return True


def take_away(folder: Folder) -> Callable[[], object]:
    """Take a step's folder out of sight as a whole, so that half of it is never taken for a checkpoint: what has a
    manifest is. Returns what deletes it.

    Raises:
        OSError: where it cannot be renamed.
    """
    if not folder.is_local:
        folder.delete(COMMITTED)
        folder.delete(MANIFEST)
        return folder.delete
    doomed = _unique(folder.path)
    folder.path.rename(doomed)
    return partial(_delete_tree, doomed)


def remove_beside(*folders: Folder) -> None:
    """Delete whole folders in a thread, for a caller whose loop must go on."""
    for folder in folders:
        _beside(folder.delete)


def _beside(work: Callable[[], object]) -> None:
    threading.Thread(target=_try, args=(work,), name=REMOVAL).start()


def _try(work: Callable[[], object]) -> None:
    """What cannot be deleted now is no checkpoint any more, and goes at a later start."""
    try:
        work()
    except STORAGE_ERRORS as error:
        log.warning(f"a removal failed, which is tried again at a later start: {error}")


def finish_removals() -> None:
    """For a process that ends without the interpreter's own end, which waits for threads."""
    for thread in threading.enumerate():
        if thread.name == REMOVAL:
            thread.join()


def _unique(path: Path) -> Path:
    """A temporary name that no earlier removal has: NFS keeps `.nfs*` files, and with them the folder, for a while."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")


def _delete_tree(path: Path) -> None:
    """What cannot be deleted now goes at a later start."""
    with contextlib.suppress(OSError):  # of a mount that fails, which rmtree lets through in places
        shutil.rmtree(path, ignore_errors=True)


def _delete_each(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            _delete_tree(path) if path.is_dir() else path.unlink()


def quarantine(checkpoints: Folder, step: int, reason: str) -> None:
    """Take a damaged checkpoint out of the readers' sight, every byte of it kept, with the reason beside it."""
    folder = checkpoints / step_name(step)
    with contextlib.suppress(OSError):  # a full disk: the event says it too
        folder.write_bytes(QUARANTINED, reason.encode())
    if folder.is_local:
        target = folder.path.with_name(ASIDE + folder.name)
        folder.path.rename(target if not target.exists() else target.with_name(f"{target.name}-{uuid.uuid4().hex[:6]}"))
    else:
        folder.delete(COMMITTED)


def quarantined(checkpoints: Folder) -> list[str]:
    """Folders of checkpoints that were set aside."""
    names = retrying(checkpoints.list, f"listing {checkpoints}")
    here = [name for name in names if name.startswith(ASIDE)]
    inside = ((name, retrying((checkpoints / name).list, f"listing {name}")) for name in names if parse_step(name))
    return here or [name for name, files in inside if QUARANTINED in files]


def clean_leftovers(checkpoints: Folder) -> list[CheckpointEvent | CheckpointSkippedEvent]:
    """Remove step folders that were never committed, and temporary files everywhere: out of sight at once, deleted in a
    thread, for every rank waits. A bucket's few objects are deleted here, as the next save has the same names.

    A folder with a manifest but no marker is committed again: the manifest is written when every file is whole, and
    who resumes from it compares the digests. So a marker that this host does not see yet costs nothing.

    Returns:
        what became of each checkpoint that was none, oldest first.
    """
    retrying(checkpoints.refresh, f"looking at {checkpoints}")
    events: list[CheckpointEvent | CheckpointSkippedEvent] = []
    for name in retrying(checkpoints.list, f"listing {checkpoints}"):
        step, folder = parse_step(name), checkpoints / name
        if step is None or not name.startswith("step-"):
            continue
        names = _names(checkpoints, name)
        if COMMITTED in names or QUARANTINED in names:
            continue
        if MANIFEST in names:
            events.append(_commit_again(folder, step))
        elif _remove_uncommitted(folder):
            reason = "never committed: the run ended while it was being written; removed"
            events.append(CheckpointSkippedEvent(step=step, reason=reason))
    _clean_temporary(checkpoints)
    return events


def _commit_again(folder: Folder, step: int) -> CheckpointEvent:
    data = retrying(partial(folder.read_bytes, MANIFEST), f"reading {MANIFEST} of {folder}")
    folder.write_bytes(COMMITTED, xxhash.xxh3_128_hexdigest(data).encode())
    try:
        num_bytes = sum(file.bytes for file in CheckpointManifest.model_validate_json(data).files.values())
    except ValueError:  # who resumes from it finds the damage
        num_bytes = 0
    return CheckpointEvent(step=step, bytes=num_bytes)


def _names(checkpoints: Folder, name: str) -> list[str]:
    """What a listed folder holds, seen anew; waits while this host still takes the folder itself for absent."""
    folder = checkpoints / name
    if not folder.is_local:
        return retrying(folder.list, f"listing {folder}")
    deadline = time.monotonic() + view_delay_s(checkpoints.path)
    while not folder.path.is_dir():
        if time.monotonic() >= deadline:
            raise OSError(f"{checkpoints} lists {name}, which this host cannot open")
        time.sleep(VIEW_POLL_S)
    retrying(folder.refresh, f"looking at {folder}")
    return retrying(folder.list, f"listing {folder}")


def _remove_uncommitted(folder: Folder) -> bool:
    """Delete it, unless a manifest shows once it has another name."""
    if not folder.is_local:
        folder.delete()
        return True
    doomed = _unique(folder.path)
    folder.path.rename(doomed)
    try:
        is_whole = MANIFEST in retrying(Folder(str(doomed)).list, f"listing {doomed}")
    except OSError:
        doomed.rename(folder.path)
        raise
    if is_whole:
        retrying(partial(doomed.rename, folder.path), f"giving {folder} its name back")
        return False
    _beside(partial(_delete_tree, doomed))
    return True


def _clean_temporary(checkpoints: Folder) -> None:
    """Files that a killed writer had not named yet; a bucket holds none, since an upload appears when it is whole."""
    if not checkpoints.is_local:
        return
    left = []
    with contextlib.suppress(OSError):  # what cannot be listed or deleted now goes at a later start
        for path in checkpoints.path.iterdir():
            if path.name.startswith(TEMPORARY):
                left.append(path)  # perhaps a folder that is being deleted: it is not looked into
            elif path.is_dir():
                left += path.glob(f"{TEMPORARY}*")
    _beside(partial(_delete_each, left))
