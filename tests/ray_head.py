"""A real Ray head node for tests, with its dashboard, on ports and in a folder of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.ray_session import start_private
from orchestrator.training.node_report import free_port


def init_ray(**options: Any) -> None:
    """A private Ray of this process, as the product starts it: once more where it misses its own deadline of 30 s."""
    import ray

    start_private(ray, {"log_to_driver": False, **options})


def free_ports(count: int) -> list[int]:
    """Different TCP ports that are free."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


@contextlib.contextmanager
def ray_head() -> Iterator[str]:
    """A Ray head of our own, whose PATH knows no Python of ours; ended with all it started, and nothing else is."""
    folder = tempfile.mkdtemp(prefix="ty-")  # short: Ray's socket paths must stay under 108 bytes
    process, address = _start_head(folder)
    try:
        deadline, again = time.monotonic() + 400, True
        while not answers(f"{address}/api/version"):
            if process.poll() is not None and again and "timed out during startup" in _log(folder):
                _end(process)  # its own deadline is 30 s: see `init_ray`
                process, address = _start_head(folder)
                again = False
            assert process.poll() is None and time.monotonic() < deadline, _log(folder)
            time.sleep(0.2)
        yield address
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(folder: str) -> "tuple[subprocess.Popen[bytes], str]":
    """A head that is starting, and the address of its dashboard."""
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={folder}/ray"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += [f"--ray-client-server-port={client}", "--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "disabled"}
    with Path(folder, "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    return process, f"http://127.0.0.1:{dashboard}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(folder: str) -> str:
    return Path(folder, "log").read_text()


def answers(url: str) -> bool:
    """Whether an HTTP server replies there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as reply:
        return reply.status == 200
    return False
