"""What a node agent tells the controller: where it is, what its ranks do, how each one ended; facts of its machine."""

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom

import psutil

from trainers.run.events import Event, FailedEvent
from trainers.worker.heartbeat import Heartbeat

FIRST_PORT = 20_000
"""Ray's workers take 10,002 to 19,999."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last of the ports that outgoing connections are given."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class NodeInfo:
    """What the other nodes need of a node."""

    node: str
    """Ray's id of it."""
    address: str
    interface: str | None
    """Network interface that has the address; None if none has (a host behind address translation)."""
    gpus: tuple[str, ...]
    """Ids of the GPUs that the group has there."""
    interfaces_set: dict[str, str]
    """INTERFACES that the node's environment sets: whoever set them knows the network better than we do."""

    def environment(self) -> dict[str, str]:
        """What its ranks are told of interfaces and GPUs. What this process's own environment sets of INTERFACES holds
        where the node's sets nothing."""
        found: dict[str, str] = {}
        if self.interface:  # NCCL takes a name as a prefix (eth1 is eth10 too) unless it begins with "="
            found |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": f"={self.interface}"}
        found |= {name: os.environ[name] for name in INTERFACES if name in os.environ} | self.interfaces_set
        if self.gpus:  # every rank sees all of the node's, so that NCCL can go from one to the other directly
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return found


@dataclass(frozen=True)
class RankExit:
    """How a rank ended."""

    rank: int
    code: int
    """Exit code; minus the signal where one killed it."""
    at: float
    """Wall time."""
    failed: FailedEvent | None
    """What it raised, if it could say so."""
    log_tail: str
    max_rss_bytes: int
    oom_kills: int
    """Processes of this machine that the kernel killed for memory while the rank ran."""
    shm_free_bytes: int
    node: str


@dataclass
class NodeReport:
    """What one node agent sees at one moment, or several, merged."""

    beats: dict[int, Heartbeat] = field(default_factory=dict)
    """By rank, of those alive."""
    events: list[Event] = field(default_factory=list)
    """Since the last report, in order."""
    exits: list[RankExit] = field(default_factory=list)
    """Of every rank that has ended."""
    lost: list[str] = field(default_factory=list)
    """Nodes given up since the last report; a node knows nothing of this."""

    def merge(self, other: "NodeReport") -> None:
        """Add another node's."""
        self.beats |= other.beats
        self.events += other.events
        self.exits += other.exits


def interface_of(address: str) -> str | None:
    """The network interface that has an address: what gloo and NCCL must be told on hosts with several."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    return None


def free_port() -> int:
    """A TCP port that was free a moment ago, and that no outgoing connection is given before a rank listens there: it
    is none of the ephemeral ports, unless these begin too low."""
    end = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 0
    ports = range(FIRST_PORT, end)
    for port in [*SystemRandom().sample(ports, min(len(ports), 100)), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("no TCP port is free")


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory so far, for a control group's limit or its own."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def free_bytes(path: str) -> int:
    """Free space of the file system that holds a path; -1 if unknown."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1
