"""A driver is called tuneyard also where `submit` started it as `python -m orchestrator`: preStop hooks look for it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.commands import submit


def test_the_hooks_find_a_driver_by_its_name() -> None:
    assert "-m orchestrator run" in str(submit.send.__defaults__), "what submit starts"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        driver = subprocess.Popen([sys.executable, "-m", "orchestrator", "registry", "list", "--uri", uri])
        try:
            deadline = time.monotonic() + 400
            while Path(f"/proc/{driver.pid}/comm").read_text().strip() != "tuneyard":
                assert time.monotonic() < deadline and driver.poll() is None
                time.sleep(0.1)
            named = subprocess.run(["pgrep", "-x", "tuneyard"], capture_output=True, text=True, check=True)
            assert str(driver.pid) in named.stdout.split()
        finally:
            driver.kill()
            driver.wait()
