"""Stacks are read from outside, of a process that may have to wait for its turn while it writes them, or is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainers.worker import stack_dump
from trainers.worker.stack_dump import code_line, parse_stacks, process_state, read_stacks

HELPER = 'Thread 0x1 (most recent call first):\n  File "/usr/lib/python3.11/threading.py", line 5 in wait\n'
MAIN = 'Thread 0x2 (most recent call first):\n  File "/x/trainers/loop.py", line 44 in _settle\n'


def test_a_dump_that_pauses_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the one who writes pauses until the first part has been read three times over."""
    file, looks = tmp_path / "stacks", []
    monkeypatch.setattr(stack_dump, "_signal_main_thread", lambda *_: file.write_text(HELPER))

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            file.write_text(HELPER + MAIN)

    now = iter(range(1000))
    monkeypatch.setattr(stack_dump, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: next(now) * 0.02))
    _, text = read_stacks(os.getpid(), file, 5.0)
    assert str(code_line(parse_stacks(text))) == "/x/trainers/loop.py:44 in _settle"


STOPS = """
import faulthandler, os, signal, sys, threading
faulthandler.register(signal.SIGUSR1, open(sys.argv[1], "w"), all_threads=True)
def count():
    while True:
        sum(range(1000))
for _ in range(3):
    threading.Thread(target=count, daemon=True).start()
def here():
    os.kill(os.getpid(), signal.SIGSTOP)
def later():
    return sum(range(10))
while True:
    here()
    for _ in range(100_000):
        later()
"""


def test_a_stopped_process_tells_where_it_stopped_and_is_stopped_again(tmp_path: Path) -> None:
    file = tmp_path / "stacks"
    (tmp_path / "stops.py").write_text(STOPS)
    with subprocess.Popen([sys.executable, "-m", "stops", str(file)], cwd=tmp_path) as process:
        try:
            for _ in range(30):
                wait_until_stopped(process.pid)
                state, text = read_stacks(process.pid, file, 60.0)
                line = code_line(parse_stacks(text))
                assert state == "T" and line is not None and line.function == "here", text
                wait_until_stopped(process.pid)
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.kill()


def wait_until_stopped(process: int) -> None:
    deadline = time.monotonic() + 120
    while process_state(process) != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
