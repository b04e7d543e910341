"""`tuneyard doctor`: is this machine, and the cluster it points to, fit to train?

Each check looks at one thing and says what it saw and, where that is a problem, what to do. Nothing is changed, no
heavy library is imported (versions come from their metadata), no cluster is joined: an address is only knocked at.
"""

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from trainers.errors import JobError
from trainers.records import Record
from trainers.storage import Folder

REQUIRED = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "ray",
    "pyarrow",
    "accelerate",
    "safetensors",
    "scikit-learn",
    "mlflow",
    "tensorboard",
)
GIB = 1 << 30
KNOCK_S = 3.0

Status = Literal["ok", "warn", "fail"]


class Check(Record):
    """One finding."""

    name: str
    status: Status
    value: str
    """What was seen."""
    remedy: str | None = None
    """What to do where it is not ok."""


def check_machine(storage: str | None = None, address: str | None = None) -> list[Check]:
    """Look at this machine, and at a Ray cluster where an address or RAY_ADDRESS names one.

    Args:
        storage: also check that this folder or bucket can be written and has space.
        address: of a Ray cluster, host:port, http://host:8265 or auto.
    """
    memory = psutil.virtual_memory()
    return [
        check_python(),
        *check_libraries(),
        check_cpu(Path("/proc/cpuinfo")),
        check_cores(),
        check_memory(memory.total, memory.available, cgroup_limit_bytes()),
        check_shared_memory(Path("/dev/shm"), memory.total),
        *([check_storage(storage)] if storage else []),
        check_gpus(),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_hostname(socket.gethostname()),
        check_interfaces(interfaces_up(), os.environ),
        check_ray(address or os.environ.get("RAY_ADDRESS")),
    ]


def worst(checks: list[Check]) -> Status:
    """The most serious among the checks."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else ("warn" if "warn" in found else "ok")


def _check(name: str, status: Status, value: str, remedy: str) -> Check:
    return Check(name=name, status=status, value=value, remedy=None if status == "ok" else remedy)


def check_python() -> Check:
    """Python 3.11 up."""
    fine = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return _check("python", "ok" if fine else "fail", platform.python_version(), "use Python 3.11 or newer")


def check_libraries() -> list[Check]:
    """Installed versions; whether they import is not tried."""
    return [_library(name) for name in REQUIRED]


def _library(name: str) -> Check:
    try:
        return Check(name=name, status="ok", value=version(name))
    except PackageNotFoundError:
        return Check(name=name, status="fail", value="not installed", remedy=f"pip install {name}, or tuneyard again")


def check_cpu(cpuinfo: Path) -> Check:
    """Model and bf16 instructions: without them bfloat16 on CPU is emulated and slower than float32."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    model = fields.get("model name", platform.machine())
    return _check(
        "cpu",
        "ok" if found else "warn",
        f"{model}, bf16: {', '.join(found) or 'none'}",
        "train with model.dtype: float32 on this CPU; bfloat16 would be emulated",
    )


def check_cores() -> Check:
    """Cores this process may use."""
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    value = f"{usable} usable of {total}"
    return _check("cores", "ok" if usable >= 2 else "warn", value, "two workers will share one core and be slow")


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory limit of the container (cgroup v2, then v1), None where there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:  # v1 writes a huge number for no limit
            return int(text)
    return None


def check_memory(total: int, available: int, limit: int | None) -> Check:
    """Memory of the machine, and of the container where that is less."""
    usable = min(available, limit) if limit else available
    limited = f", container limit {limit / GIB:.1f} GiB" if limit else ""
    value = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}{limited}"
    return _check(
        "memory", "ok" if usable >= 4 * GIB else "warn", value, "below 4 GiB even small models may not fit; free some"
    )


def check_shared_memory(path: Path, memory_bytes: int) -> Check:
    """Ray's object store lives here; containers often come with 64 MiB."""
    if not path.exists():
        return Check(
            name="shared memory", status="warn", value=f"{path} does not exist", remedy="Ray will use slow disk files"
        )
    usage = shutil.disk_usage(path)
    enough = usage.total >= min(0.3 * memory_bytes, 8 * GIB)  # Ray asks for 30 % of memory
    value = f"{usage.free / GIB:.2f} GiB free of {usage.total / GIB:.2f} in {path}"
    remedy = "give the container more: docker run --shm-size=8g, or an emptyDir with medium Memory at /dev/shm"
    return _check("shared memory", "ok" if enough else "warn", value, remedy)


def check_storage(storage: str) -> Check:
    """Whether a folder or bucket can be written, and how much is free where that can be known."""
    folder = Folder(storage)
    try:
        folder.check_writable()
    except JobError as error:
        return Check(name="storage", status="fail", value=str(error), remedy="name a folder or bucket you may write to")
    if not folder.is_local:
        return Check(name="storage", status="ok", value=f"{storage} can be written")
    free = shutil.disk_usage(folder.path).free
    value = f"{free / GIB:.1f} GiB free at {storage}"
    remedy = "a checkpoint takes 12 bytes a parameter, and several are kept: free space or name another folder"
    return _check("storage", "ok" if free >= 20 * GIB else "warn", value, remedy)


def check_gpus() -> Check:
    """GPUs as the driver sees them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return Check(name="gpus", status="ok", value="none (no NVIDIA driver): training runs on CPU over gloo")
    except (OSError, subprocess.TimeoutExpired) as error:
        done = subprocess.CompletedProcess(command, 1, "", str(error))
    found = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not found:
        seen = (done.stderr or done.stdout).strip()[:200] or "no GPU is listed"
        return Check(name="gpus", status="fail", value=f"nvidia-smi: {seen}", remedy="repair the driver, or remove it")
    return Check(name="gpus", status="ok", value=f"{len(found)}: {'; '.join(found)}")


def check_open_files(soft_limit: int) -> Check:
    """Ray opens many sockets and files a node."""
    remedy = "raise it for the user that starts Ray: ulimit -n 65536"
    return _check("open files", "ok" if soft_limit >= 4096 else "warn", f"limit {soft_limit}", remedy)


def check_hostname(name: str) -> Check:
    """The other nodes, and gloo, look this machine up by its name."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"add a line for {name} to /etc/hosts, or name it in DNS"
        return Check(name="hostname", status="warn", value=f"{name} does not resolve ({error})", remedy=remedy)
    return Check(name="hostname", status="ok", value=f"{name} is {address}")


def interfaces_up() -> dict[str, str]:
    """IPv4 address of each network interface that is up, loopback left out."""
    state = psutil.net_if_stats()
    return {
        name: found.address
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family == socket.AF_INET
        and not found.address.startswith("127.")
        and name in state
        and state[name].isup
    }


def check_interfaces(found: Mapping[str, str], environment: Mapping[str, str]) -> Check:
    """With several interfaces gloo and NCCL may choose one that the other nodes do not reach."""
    listed = ", ".join(f"{name} {address}" for name, address in sorted(found.items())) or "loopback only"
    named = {key: environment[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if environment.get(key)}
    value = listed + "".join(f", {key}={name}" for key, name in named.items())
    remedy = (
        "on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that the nodes share, "
        "in the environment of `ray start` on each node"
    )
    return _check("network", "ok" if len(found) < 2 or named else "warn", value, remedy)


def check_ray(address: str | None) -> Check:
    """Whether something listens at the cluster's address; nothing is joined."""
    if not address or address == "local":
        return Check(name="ray address", status="ok", value="no address: a job starts its own Ray and stops it after")
    if address == "auto":
        return Check(name="ray address", status="ok", value="auto: the cluster that this node belongs to")
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        port = parts.port or {"https": 443, "http": 8265, "ray": 10001}.get(parts.scheme, 6379)
        with socket.create_connection((parts.hostname or "", port), timeout=KNOCK_S):
            return Check(name="ray address", status="ok", value=f"{address} answers")
    except (OSError, ValueError) as error:
        remedy = (
            "check the address and that the head runs (`ray start --head`); unset RAY_ADDRESS to run on this machine"
        )
        return Check(name="ray address", status="fail", value=f"{address} does not answer ({error})", remedy=remedy)
