"""One writer a run folder: an flock on `driver.lock` that ends with the process, under every launcher."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from trainers.errors import JobError
from trainers.storage import Folder

LOCK = "driver.lock"
LET_GO_S = 2.0
"""How long an owner is waited for that only looks, as `tuneyard status` does for a moment."""
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that know no locks, or whose lock server is gone."""


class FolderInUse(JobError):
    """Another process is at work on a folder: once it lets go, the same command goes well."""


@contextmanager
def own_folder(folder: Folder, wait_s: float = LET_GO_S) -> Iterator[None]:
    """Own a run folder for the length of the block.

    Args:
        wait_s: how long another owner may take to let go.

    Raises:
        FolderInUse: another process is at work on it.
        JobError: its file system knows no locks.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / LOCK).open("w") as lock:
        deadline = time.monotonic() + wait_s
        while not hold(lock, folder):
            if time.monotonic() < deadline:
                time.sleep(min(wait_s, 0.05))
                continue
            raise FolderInUse(f"another process is at work on {folder}; wait for it or stop it first")
        yield


def hold(file: TextIO, folder: Folder, wait: bool = False) -> bool:
    """Lock a file for this process; False where another has it, unless it is waited for.

    Raises:
        JobError: its file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        raise JobError(
            f"storage: {folder} cannot be locked ({error.strerror}), so that two commands could write there at once; "
            "mount it with locks (NFS: without nolock, lockd running; Lustre: -o flock), or name another storage"
        ) from error
    return True
