"""A Ray that does not start is tried once more, then one message; a cluster that lets nobody in is one too."""

import os
import subprocess
import sys
from typing import Any

import pytest
import ray

from orchestrator.ray_session import _start
from trainers.errors import PlacementError

HANDLER_SET_BEFORE = """
import os, psutil, signal
from orchestrator.ray_session import ray_session

def stop(*_):
    raise SystemExit(75)

signal.signal(signal.SIGTERM, stop)
with ray_session(None):
    started = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    (raylet,) = [words for words in started if "/raylet " in words]  # it names the programs that it could start
    started.remove(raylet)
    idle = ("monitor.py", "dashboard.py", "default_worker.py", "ray::IDLE")
    assert not any(name in words for words in started for name in idle), started
    os.kill(os.getpid(), signal.SIGTERM)
"""


class Stubborn:
    """Ray that fails to start so many times."""

    exceptions = ray.exceptions

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error = failures, error
        self.calls: list[str] = []

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        if self.failures:
            self.failures -= 1
            raise self.error

    def shutdown(self) -> None:
        self.calls.append("shutdown")


LATE = Exception("The current node timed out during startup. This could happen because\nmore")


def test_a_start_that_misses_its_deadline_is_tried_once_more() -> None:
    slow = Stubborn(1, LATE)
    _start(slow, None)
    assert slow.calls == ["init", "shutdown", "init"]


def test_twice_is_a_message_with_the_log() -> None:
    dead = Stubborn(9, LATE)
    with pytest.raises(PlacementError, match=r"did not start .*, twice: The current node.*ulimit -n is \d+.*logs$"):
        _start(dead, None)
    assert dead.calls == ["init", "shutdown"] * 2


def test_a_cluster_that_wants_a_token_is_told_of() -> None:
    closed = Stubborn(1, ray.exceptions.AuthenticationError("Unauthenticated: no token"))
    with pytest.raises(PlacementError, match="RAY_AUTH_MODE and the token"):
        _start(closed, "10.0.0.1:6379")
    assert closed.calls == ["init"]


@pytest.mark.cluster
def test_a_private_ray_has_no_idle_helpers_and_a_handler_of_sigterm_that_was_set_before_is_the_one_that_acts() -> None:
    """As `tuneyard run` has it while it evaluates and registers: exit code 75, not Ray's 15."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", HANDLER_SET_BEFORE], env=kept, timeout=400, check=False)
    assert done.returncode == 75
