"""Ends what a killed driver leaves behind: Ray's helper processes outlive their raylet by up to a minute.

The driver starts this file as a process of its own and holds a pipe to it. Whatever way the driver ends, the pipe
closes; then every process of its Ray session is killed. They are known by the log files they hold open, whose folder is
named after the driver (their environment is no mark: Ray's process titles overwrite it). Imports nothing but the
standard library, so it starts in a few hundredths of a second. Linux only: elsewhere nothing is guarded.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SESSION_TIME = "session_%Y-%m-%d_%H-%M-%S"
"""How Ray begins the name of a session's folder; it ends with the process that called ray.init."""
GRACE_S = 5.0
"""Time in which processes may end by themselves before they are killed."""
WATCH_S = 15.0
"""How long stragglers, started while their parents were dying, are looked for."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Have the Ray session that this process starts in the block ended once the block, or this process, has ended."""
    if not Path("/proc/self/fd").exists():
        yield
        return
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, str(os.getpid()), time.strftime(SESSION_TIME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()


def session_processes(driver: int, since: str) -> list[int]:
    """Living processes that hold files of a Ray session which this driver started at that time or later."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == driver:
            continue  # it lives, so it was not killed: after its session it may still print, and take its time
        with contextlib.suppress(OSError):
            files = (str(file.readlink()) for file in (folder / "fd").iterdir())
            if any(_is_of(file, driver, since) for file in files):
                processes.append(int(folder.name))
    return processes


def _is_of(file: str, driver: int, since: str) -> bool:
    names = [part for part in file.split("/") if part.startswith("session_")]
    return any(name.endswith(f"_{driver}") and name[: len(since)] >= since for name in names)


def reap(driver: int, since: str) -> None:
    """Give the session's processes a moment, then kill them until none are left."""
    deadline = time.monotonic() + GRACE_S
    while session_processes(driver, since) and time.monotonic() < deadline:
        time.sleep(0.2)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        for process in session_processes(driver, since):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.5)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the driver's end of the pipe closes
    reap(int(sys.argv[1]), sys.argv[2])
