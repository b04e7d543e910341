"""Where a process stands, told from outside: its state, and the Python stack of each thread.

The process has registered `faulthandler` on SIGUSR1, which writes from the signal handler itself, also while the GIL is
held. A stopped process (SIGSTOP) writes when it is woken, and is stopped again.
"""

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.training.straggler import in_collective

FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
QUIET_S = 0.2
"""A dump is whole once no more of it has come for so long: on a busy machine its process waits for its turn meanwhile,
and the main thread, which tells most, comes last."""
OUTERMOST = " in _run_module_as_main\n"
"""Ends a whole dump: the main thread's first frame, of `python -m`."""
LIBRARIES = ("site-packages", "dist-packages", "/lib/python3", "<frozen")


@dataclass(frozen=True)
class Frame:
    """One frame of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def read_stacks(process: int, file: Path, wait_s: float) -> tuple[str, str]:
    """(process state, new stacks) of a process; stacks are empty where it does not answer in time."""
    state = process_state(process)
    stopped = state in ("T", "t")
    size = file.stat().st_size if file.exists() else 0
    with contextlib.suppress(ProcessLookupError):
        _signal_main_thread(process, signal.SIGUSR1)
        if stopped:
            os.kill(process, signal.SIGCONT)
    came = time.monotonic()
    deadline, text = came + wait_s, ""
    while time.monotonic() < deadline and file.exists():
        grown = file.read_text(errors="replace")[size:]
        if grown != text:
            text, came = grown, time.monotonic()
        if text.endswith(OUTERMOST) or (text and time.monotonic() - came > QUIET_S):
            break
        time.sleep(0.01)
    if stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
    return state, text


def _signal_main_thread(process: int, number: int) -> None:
    """Any thread of a woken process may take a signal that is sent to the process, while the main thread goes on; one
    that is the main thread's own comes before its next instruction."""
    send = getattr(ctypes.CDLL(None), "tgkill", None)  # since glibc 2.30
    if send is None or send(process, process, int(number)):
        os.kill(process, number)


def process_state(process: int) -> str:
    """The letter of /proc/<id>/stat: R running, S sleeping, D waiting for a disk, T stopped, Z dead; X where gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def parse_stacks(text: str) -> list[list[Frame]]:
    """The threads of a faulthandler dump, innermost frame first; the main thread is the last."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if "most recent call first" in line:
            threads.append([])
        elif threads and (found := FRAME.match(line)):
            threads[-1].append(Frame(found["file"], int(found["line"]), found["function"]))
    return threads


def waits_for_others(threads: Sequence[Sequence[Frame]]) -> bool:
    """Whether any thread stands in a collective."""
    return any(in_collective([(frame.file, frame.function) for frame in stack]) for stack in threads)


def code_line(threads: Sequence[Sequence[Frame]]) -> Frame | None:
    """The line to look at: the main thread's innermost frame outside libraries, else its innermost."""
    if not threads or not threads[-1]:
        return None
    own = (frame for frame in threads[-1] if not any(part in frame.file for part in LIBRARIES))
    return next(own, threads[-1][0])
