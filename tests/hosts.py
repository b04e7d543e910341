"""Two hosts on one machine: network namespaces joined by a veth pair, a Ray node in each. Needs root and iproute2."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PORT = 6379
UNAVAILABLE = (
    "network namespaces need root"
    if os.geteuid() != 0
    else "ip (iproute2) is not installed"
    if not shutil.which("ip")
    else ""
)
"""Why hosts cannot be made here, or nothing."""


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    address: str
    link: str
    folder: Path
    """Ray's temporary folder and the home folder of its processes."""

    def command(self, *words: str) -> list[str]:
        """A command as it runs on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def environment(self) -> dict[str, str]:
        """Without this session's Ray, and with the cluster's token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        extra = {"HOME": str(self.folder.parent), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
        return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | extra

    def start_ray(self, head: "Host | None" = None, cpus: int = 1) -> None:
        """Start a Ray node: the head, or one that joins it; once more where it misses its own deadline of 30 s."""
        place = (
            [f"--address={head.address}:{PORT}"] if head else ["--head", f"--port={PORT}", "--include-dashboard=false"]
        )
        words = [
            "ray", "start", *place, f"--node-ip-address={self.address}", f"--num-cpus={cpus}",
            f"--temp-dir={self.folder}", "--object-store-memory=100000000", "--disable-usage-stats",
            "--include-log-monitor=false",
        ]  # fmt: skip
        for _ in range(2):
            done = subprocess.run(
                self.command(*words), env=self.environment(), capture_output=True, text=True, timeout=400, check=False
            )
            if "timed out during startup" not in done.stdout + done.stderr:
                break
            self.kill_everything()
        assert done.returncode == 0, done.stdout + done.stderr

    def drain(self, head: "Host") -> None:
        """What a cloud's preemption notice leads to: the cluster is told that this node goes in a minute."""
        said = subprocess.run(
            self.command("ray", "drain-node", f"--address={head.address}:{PORT}", f"--node-id={self._node_id()}",
                         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test",
                         "--deadline-remaining-seconds=60"),
            env=self.environment(), capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert said.returncode == 0, said.stdout + said.stderr

    def _node_id(self) -> str:
        """Ray's id of this host, as the command line of its raylet has it."""
        words = [word for pid in self._processes() for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
        (found,) = {word.removeprefix("--node_id=") for word in words if word.startswith("--node_id=")}
        return found

    def _processes(self) -> list[int]:
        """Everything that runs on this host."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill_everything(self) -> None:
        """What a power cut does: every process of the host is gone at once."""
        for _ in range(50):
            processes = self._processes()
            if not processes:
                return
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    def set_link(self, state: str) -> None:
        """Cut the network cable (`down`), or put it back (`up`)."""
        subprocess.run(["ip", "-n", self.name, "link", "set", self.link, state], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a Ray node of one core each, ended and removed after."""
    folder = Path(tempfile.mkdtemp(prefix="ty-"))  # short: Ray's socket paths must stay under 108 bytes
    tag = os.getpid() % 100000
    hosts = tuple(
        Host(f"ty{tag}{side}", f"10.77.{tag % 250}.{number}", f"ty{tag}{side}", folder / side)
        for number, side in ((1, "a"), (2, "b"))
    )
    first, second = hosts
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        subprocess.run(
            ["ip", "link", "add", first.link, "netns", first.name, "type", "veth", "peer", "name", second.link,
             "netns", second.name],
            check=True,
        )  # fmt: skip
        for host in hosts:
            subprocess.run(["ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link], check=True)
            subprocess.run(["ip", "-n", host.name, "link", "set", "lo", "up"], check=True)
            host.set_link("up")
        generate = [str(Path(sys.executable).parent / "ray"), "get-auth-token", "--generate"]
        subprocess.run(generate, env=first.environment(), check=True, capture_output=True)
        first.start_ray()
        second.start_ray(first)
        yield first, second
    finally:
        for host in hosts:
            host.kill_everything()
            subprocess.run(["ip", "netns", "del", host.name], check=False)
        shutil.rmtree(folder, ignore_errors=True)
