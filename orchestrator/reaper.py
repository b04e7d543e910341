"""Ends what a killed driver leaves behind: Ray's helper processes outlive their raylet by up to a minute.

The driver starts this file as a process of its own and holds a pipe to it. Whatever way the driver ends, the pipe
closes; then every process that carries the driver's mark in its environment is killed. Imports nothing but the standard
library, so it starts in a few hundredths of a second. Linux only: elsewhere nothing is guarded.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "TUNEYARD_SESSION"
GRACE_S = 5.0
"""Time in which processes may end by themselves before they are killed."""
WATCH_S = 15.0
"""How long stragglers, started while their parents were dying, are looked for."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Mark every process started in the block, and have the marked ones ended once this process is gone or done."""
    if not Path("/proc/self/environ").exists():
        yield
        return
    mark = uuid.uuid4().hex
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]
        assert guard.stdin is not None
        guard.stdin.close()


def marked(mark: str) -> list[int]:
    """Living processes that carry the mark."""
    entry, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def reap(mark: str) -> None:
    """Give marked processes a moment, then kill them until none are left."""
    deadline = time.monotonic() + GRACE_S
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        for process in marked(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.5)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the driver's end of the pipe closes
    reap(sys.argv[1])
