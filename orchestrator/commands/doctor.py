"""`tuneyard doctor`: is this machine, and the cluster it points to, fit to train?

A probe looks at one thing and returns its state and what it saw; `REMEDIES` says what to do where that is not ok.
Nothing is changed, no heavy library is imported (versions come from their metadata; where there are GPUs, another
process imports torch), no cluster is joined: an address is only connected to.
"""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from orchestrator.terminal.table import show
from trainers.compiler import compiler_problem
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
CONNECT_S = 3.0
NO_GPU = "none"

Status = Literal["ok", "warn", "fail"]


Finding = tuple[Status, str]
"""State, and what was seen."""

REMEDIES = {
    "python": "use Python 3.11 or newer",
    "cpu": "train with model.dtype: float32 on this CPU; bfloat16 would be emulated",
    "cores": "two workers will share one core and be slow",
    "memory": "below 4 GiB even small models may not fit; free some",
    "shared memory": "give the container more: docker run --shm-size=8g, or an emptyDir with medium Memory at /dev/shm",
    "storage": "name a folder or bucket you may write to, with room: a checkpoint takes 12 bytes a parameter, several "
    "are kept",
    "gpus": "repair the driver, or remove it",
    "torch on gpus": "install a torch that goes with the driver: see the table at https://pytorch.org/get-started",
    "compiler": "install it: without it the loss takes more time and memory, and train.compile fails",
    "open files": "raise it for the user that starts Ray: ulimit -n 65536",
    "hostname": "add a line for it to /etc/hosts, or name it in DNS",
    "network": "on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that the nodes share, "
    "in the environment of `ray start` on each node",
    "ray address": "check the address and that the head runs (`ray start --head`); unset RAY_ADDRESS to run on this "
    "machine",
}


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
    gpus = probe_gpus()
    with_gpus = gpus[0] == "ok" and not gpus[1].startswith(NO_GPU)
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count()
    findings: dict[str, Finding] = {
        "python": ("ok" if sys.version_info >= (3, 11) else "fail", platform.python_version()),
        **{name: probe_library(name) for name in REQUIRED},
        "cpu": probe_cpu(Path("/proc/cpuinfo")),
        "cores": ("ok" if cores >= 2 else "warn", f"{cores} usable of {all_cores}"),
        "memory": probe_memory(memory.total, memory.available, cgroup_limit_bytes()),
        "shared memory": probe_shared_memory(Path("/dev/shm"), memory.total),
        **({"storage": probe_storage(storage)} if storage else {}),
        "gpus": gpus,
        **({"torch on gpus": probe_torch(), "compiler": probe_compiler()} if with_gpus else {}),
        "open files": probe_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        "hostname": probe_hostname(socket.gethostname()),
        "network": probe_interfaces(interfaces_up(), os.environ),
        "ray address": probe_ray(address or os.environ.get("RAY_ADDRESS")),
    }
    return [
        Check(
            name=name,
            status=status,
            value=value,
            remedy=None if status == "ok" else REMEDIES.get(name, f"pip install {name}, or tuneyard again"),
        )
        for name, (status, value) in findings.items()
    ]


def probe_library(name: str) -> Finding:
    """The installed version; whether it imports is not tried."""
    try:
        return "ok", version(name)
    except PackageNotFoundError:
        return "fail", "not installed"


def probe_cpu(cpuinfo: Path) -> Finding:
    """Model and bf16 instructions: without them bfloat16 on CPU is emulated and slower than float32."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    bf16 = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    model = fields.get("model name", platform.machine())
    return "ok" if bf16 else "warn", f"{model}, bf16: {', '.join(bf16) or 'none'}"


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory limit of the container (cgroup v2, then v1), None if there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:  # v1 writes a huge number for no limit
            return int(text)
    return None


def probe_memory(total: int, available: int, limit: int | None) -> Finding:
    """Memory of the machine, and of the container where that is less."""
    usable = min(available, limit) if limit else available
    limited = f", container limit {limit / GIB:.1f} GiB" if limit else ""
    value = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}{limited}"
    return "ok" if usable >= 4 * GIB else "warn", value


def probe_shared_memory(path: Path, memory_bytes: int) -> Finding:
    """Ray's object store lives here; containers often come with 64 MiB."""
    if not path.exists():
        return "warn", f"{path} does not exist, so Ray will use slow disk files"
    usage = shutil.disk_usage(path)
    enough = usage.total >= min(0.3 * memory_bytes, 8 * GIB)  # Ray asks for 30 % of memory
    return "ok" if enough else "warn", f"{usage.free / GIB:.2f} GiB free of {usage.total / GIB:.2f} in {path}"


def probe_storage(storage: str) -> Finding:
    """Whether a folder or bucket can be written, and how much is free where that can be known."""
    folder = Folder(storage)
    try:
        folder.check_writable()
    except JobError as error:
        return "fail", str(error)
    if not folder.is_local:
        return "ok", f"{storage} can be written"
    free = shutil.disk_usage(folder.path).free
    return "ok" if free >= 20 * GIB else "warn", f"{free / GIB:.1f} GiB free at {storage}"


def probe_gpus() -> Finding:
    """GPUs as the driver sees them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return "ok", f"{NO_GPU} (no NVIDIA driver): training runs on CPU over gloo"
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = subprocess.CompletedProcess(command, 1, "", str(error))
    listed = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not listed:
        return "fail", f"nvidia-smi: {(answer.stderr or answer.stdout).strip()[:200] or 'no GPU is listed'}"
    return "ok", f"{len(listed)}: {'; '.join(listed)}"


def probe_torch() -> Finding:
    """Whether torch can use the GPUs that the driver lists; a process of its own imports it."""
    words = "import torch; torch.cuda.init(); print(torch.cuda.device_count(), 'with CUDA', torch.version.cuda)"
    try:
        answer = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "fail", str(error)
    if answer.returncode:
        return "fail", (answer.stderr.strip().splitlines() or ["torch cannot be imported"])[-1][:200]
    return "ok", answer.stdout.strip()


def probe_compiler() -> Finding:
    """Whether the stubs of Triton's kernels can be built."""
    problem = compiler_problem()
    return ("warn", f"there is not {problem}") if problem else ("ok", "Triton's kernels can be built")


def probe_open_files(soft_limit: int) -> Finding:
    """Ray opens many sockets and files a node."""
    return "ok" if soft_limit >= 4096 else "warn", f"limit {soft_limit}"


def probe_hostname(name: str) -> Finding:
    """The other nodes, and gloo, look this machine up by its name."""
    try:
        return "ok", f"{name} is {socket.gethostbyname(name)}"
    except OSError as error:
        return "warn", f"{name} does not resolve ({error})"


def interfaces_up() -> dict[str, str]:
    """IPv4 address of each network interface that is up, without loopback."""
    state = psutil.net_if_stats()
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in state and state[name].isup
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }


def probe_interfaces(interfaces: Mapping[str, str], environment: Mapping[str, str]) -> Finding:
    """With several interfaces gloo and NCCL may choose one that the other nodes do not reach."""
    listed = ", ".join(f"{name} {address}" for name, address in sorted(interfaces.items())) or "loopback only"
    named = {key: environment[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if environment.get(key)}
    value = listed + "".join(f", {key}={name}" for key, name in named.items())
    return "ok" if len(interfaces) < 2 or named else "warn", value


def probe_ray(address: str | None) -> Finding:
    """Whether something listens at the cluster's address."""
    if not address or address == "local":
        return "ok", "no address: a job starts its own Ray and stops it after"
    if address == "auto":
        return "ok", "auto: the cluster that this node belongs to"
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        port = parts.port or {"https": 443, "http": 8265, "ray": 10001}.get(parts.scheme, 6379)
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S):
            return "ok", f"{address} answers"
    except (OSError, ValueError) as error:
        return "fail", f"{address} does not answer ({error})"


def checks_table(checks: Sequence[Check]) -> None:
    """One line a check."""
    rows = [(check.name, check.status, check.value, check.remedy) for check in checks]
    show("doctor", ("check", "state", "value", "remedy"), rows, [check.status for check in checks])
