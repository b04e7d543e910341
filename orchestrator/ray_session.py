"""Ray for the length of one command: started here and sized to this machine, or joined where an address is given."""

import logging
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.reaper import guarded
from trainers.errors import PlacementError
from trainers.job.sections import ScaleSection

T = TypeVar("T")
OBJECT_STORE_BYTES = 256 * 2**20
"""Shards travel through files, not through Ray's object store, so a small one is enough."""
ON_DEMAND = {"prestart_worker_first_driver": False}
"""Ray's own settings: worker processes start when there is work for them, not one a core beforehand."""
ANYWHERE = "DEFAULT"
"""Where Ray puts a task: any node with room, also where who asks is a sweep's trial, whose own room holds no core."""
ASK_WAIT_S = 60.0
"""How long nodes may take to tell what they have."""
JOIN_WAIT_S = 20.0
"""How long to wait for the nodes of a joined cluster to appear."""


@contextmanager
def ray_session(address: str | None = None) -> Iterator[Any]:
    """Ray, running. What this starts it stops; a joined cluster stays.

    Args:
        address: of a running cluster; by default RAY_ADDRESS, and without that a private one is started.

    Raises:
        PlacementError: where no cluster answers at the address, or Ray does not start here.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield ray
        return
    with guarded() if address is None else nullcontext():
        with _own_handler(signal.SIGTERM):
            _start(ray, address)
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _own_handler(number: int) -> Iterator[None]:
    """Keep a handler that this program has set: ray.init puts one in its place that exits with the signal's number."""
    before = signal.getsignal(number)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(number, before)


def _start(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        start_private(ray, quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address!r}: {error}. Check the address and, on clusters of several nodes, "
            "RAY_AUTH_MODE and the token; or leave the address out to run on this machine"
        ) from error


def start_private(ray: Any, options: dict[str, Any]) -> None:
    """Start a private Ray; on a loaded machine it may miss its own deadline, so it is tried once more.

    Args:
        options: of `ray.init`; by default all cores and a small object store.

    Raises:
        PlacementError: it did not start.
    """
    options = {"num_cpus": usable_cpus(), "object_store_memory": OBJECT_STORE_BYTES} | options
    for tries_left in (1, 0):
        try:
            with _without_helpers():
                ray.init(address="local", include_dashboard=False, _system_config=ON_DEMAND, **options)
            return
        except Exception as error:  # of a raylet that does not come up Ray says no more than Exception
            ray.shutdown()
            if tries_left:
                continue
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
            files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise PlacementError(
                f"Ray did not start on this machine, twice: {cause}. A busy machine or little memory is the usual "
                f"reason, or too few open files (ulimit -n is {files}); its log: {logs}"
            ) from error


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Of Ray's helper processes, three have nothing to do on a machine of one's own: no node is ever added, logs stay
    in their files, and without a dashboard its process only sends statistics of use. Each takes one or two seconds of
    CPU; `ray.init` waits for the last, and has no option for them."""
    from ray._private import parameter, services

    made, started = parameter.RayParams, services.start_api_server
    parameter.RayParams = partial(made, no_monitor=True, include_log_monitor=False)
    services.start_api_server = lambda *_, **__: ("", None)
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = made, started


def usable_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_per_worker(scale: ScaleSection, cluster: dict[str, float]) -> int:
    """GPUs each worker takes; auto means one where the cluster has any."""
    if scale.gpus_per_worker == "auto":
        return 1 if cluster.get("GPU", 0) >= 1 else 0
    return scale.gpus_per_worker


def check_placement(scale: ScaleSection, wait_s: float = JOIN_WAIT_S) -> int:
    """Wait until the cluster can hold the smallest allowed number of workers.

    Returns:
        GPUs per worker.

    Raises:
        PlacementError: with what is needed and what is there.
    """
    import ray

    deadline = time.monotonic() + (wait_s if os.environ.get("RAY_ADDRESS") or len(ray.nodes()) > 1 else 0.0)
    while True:
        cluster = ray.cluster_resources()
        gpus = gpus_per_worker(scale, cluster)
        problem = placement_problem(scale, gpus, cluster)
        if problem is None:
            return gpus
        if time.monotonic() >= deadline:
            raise PlacementError(problem)
        time.sleep(1.0)


def placement_problem(scale: ScaleSection, gpus: int, cluster: dict[str, float]) -> str | None:
    """Why the workers cannot be placed, or None."""
    need = {"CPU": scale.min_workers * scale.cpus_per_worker, "GPU": scale.min_workers * gpus}
    short = [f"{count} {kind}s (there are {cluster.get(kind, 0):g})" for kind, count in need.items()
             if cluster.get(kind, 0) < count]  # fmt: skip
    if not short:
        return None
    return (
        f"{scale.min_workers} workers of {scale.cpus_per_worker} CPUs and {gpus} GPUs need {' and '.join(short)}: "
        "lower scale.workers, scale.cpus_per_worker or scale.gpus_per_worker, or add nodes"
    )


def gpu_memory() -> int | None:
    """Bytes of memory of this machine's smallest GPU; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in answer.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def smallest_gpu(ray: Any) -> int | None:
    """Bytes of memory of the smallest GPU in a running cluster, as its nodes tell it; None where no node does."""
    return min(filter(None, ask_nodes(ray, gpu_memory, "GPU")), default=None)


def ask_nodes(ray: Any, question: Callable[[], T], resource: str = "CPU") -> list[T]:
    """What every node of a running cluster that has a resource answers; one that has just gone has no say."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(question)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    told, _ = ray.wait(asked, num_returns=len(asked), timeout=ASK_WAIT_S) if asked else ([], [])
    known: list[T] = []
    for answer in told:
        with suppress(ray.exceptions.RayError):
            known.append(ray.get(answer))
    return known
