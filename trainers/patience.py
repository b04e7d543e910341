"""How long storage is waited for: errors that may pass are tried again, and names that another host has just written
may show late. What could not be read is never taken for damaged.
"""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

RETRY_S = 60.0
"""How long an operation that fails is tried again, before the failure is passed on."""
VIEW_S = 120.0
"""How long a host may not see what another one wrote: NFS keeps names and sizes up to 60 s (acdirmax, acregmax)."""
VIEW_POLL_S = 0.5
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors that are answers: to ask again gives the same."""
ONE_VIEW = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
"""File systems of one host, where everybody sees what is written at once."""


def retrying(action: Callable[[], T], what: str) -> T:
    """The result of an operation on storage, tried again with growing pauses while it fails.

    Args:
        what: what is being done, for the message.

    Raises:
        OSError: that of the last try, which says how long it was tried for; lasting ones at once.
    """
    deadline, pause = time.monotonic() + RETRY_S, 0.02
    while True:
        try:
            return action()
        except LASTING:
            raise
        except OSError as error:
            if time.monotonic() + pause > deadline:
                text = f"{what}: {error.strerror or error} (tried for {RETRY_S:g} s; is the storage in trouble?)"
                raise OSError(error.errno or errno.EIO, text) from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def view_delay_s(path: Path) -> float:
    """How long this host may see an old state of a folder: nothing where only this host can write it."""
    mounts: list[tuple[str, str]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        mounts.append((fields.split()[4].replace("\\040", " "), kind.split()[0]))
    real = path.resolve()
    holding = [mount for mount in mounts if real.is_relative_to(mount[0])]
    return 0.0 if max(holding, key=lambda mount: len(mount[0]))[1] in ONE_VIEW else VIEW_S
