"""Memory of the node a rank runs on, within the limit of its container."""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
FILES = (("memory.max", "memory.current", "inactive_file"),
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
"""Limit, usage and what of it the kernel gives back first: cgroup v2, then v1."""

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def give_freed_memory_back(least: int) -> None:
    """Let the C library give freed memory of so many bytes back to the node at once, unless the environment says how it
    allocates. glibc keeps it for what comes next, and what lives on between free parts holds them."""
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, least)


def node_id() -> str:
    """Names the memory that this process shares with others: the host, and its container there."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    memory = [line for line in groups if line.split(":")[1] in ("", "memory")]
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {memory}"


def memory_limit() -> int:
    """Bytes this node can ever hold."""
    return min(int(psutil.virtual_memory().total), *(limit for limit, _ in _limits()), UNLIMITED)


def memory_available() -> int:
    """Bytes that are free now."""
    return min(int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits()), UNLIMITED)


def _limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Limit and usage of each control group this process is in, from its own to the outermost."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        # in a container the path may be that of the host, and the group is the root of what is mounted
        groups = [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]
        for group in groups[: groups.index(top) + 1]:
            for limit, usage, cache in FILES:
                if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
                    given_back = [line.split()[1] for line in (group / "memory.stat").read_text().splitlines()
                                  if line.startswith(f"{cache} ")]  # fmt: skip
                    yield int(text), int((group / usage).read_text()) - sum(map(int, given_back))
