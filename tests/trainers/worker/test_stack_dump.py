"""Stacks are read from outside, of a process that may have to wait for its turn while it writes them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainers.worker import stack_dump
from trainers.worker.stack_dump import code_line, parse_stacks, read_stacks

HELPER = 'Thread 0x1 (most recent call first):\n  File "/usr/lib/python3.11/threading.py", line 5 in wait\n'
MAIN = 'Thread 0x2 (most recent call first):\n  File "/x/trainers/loop.py", line 44 in _settle\n'


def test_a_dump_that_pauses_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the one who writes pauses until the first part has been read three times over."""
    file, looks = tmp_path / "stacks", []
    monkeypatch.setattr(stack_dump.os, "kill", lambda *_: file.write_text(HELPER))

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            file.write_text(HELPER + MAIN)

    now = iter(range(1000))
    monkeypatch.setattr(stack_dump, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: next(now) * 0.02))
    _, text = read_stacks(os.getpid(), file, 5.0)
    assert str(code_line(parse_stacks(text))) == "/x/trainers/loop.py:44 in _settle"
