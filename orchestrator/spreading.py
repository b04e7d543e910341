"""Spreads the units of the data stage over the cluster by Ray Data, and takes back one small record a unit.

Reading, tokenizing and writing a unit is one task, because rows as JSON gives them (values of mixed types, malformed
lines) do not pass unchanged through the Arrow blocks between Ray Data's operators, and a unit without rows would leave
no block behind. Ray Data retries tasks whose worker died. No pool of actors: on a small machine it leaves no core to
those that feed it. Begin at `spread`.
"""

import gc
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from trainers.data.manifest import Record
from trainers.data.quick_tokenizer import TokenizerDiffers
from trainers.data.readers import Unit
from trainers.data.shard_writer import ShardWork
from trainers.errors import TuneyardError

TASKS_A_CPU, UNITS_A_TASK = 3, 32
"""Tasks that each core gets at least, and units a task at most: between two tasks a core waits about 20 ms, and at the
end of a task for its last sync."""
LIMITS_S = 0.02
"""How often Ray Data asks what it may use: it starts with leave for one task alone, and asks again after a second."""
MOST_STARTED = 256
ALLOCATIONS = 200_000
"""New objects until Python looks for cycles. Rows have none, and to look every 700 objects took a seventh of a task."""
AnyRecord = TypeVar("AnyRecord", bound=Record)
GroupFunction = Callable[[ShardWork, Sequence[Unit]], Iterator[tuple[int, str]]]


def start_workers() -> None:
    """Have a worker a core started, with what tasks import, while the driver reads the tokenizer: 2 s for each."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    start = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_import_all)
    for _ in range(min(cpus, MOST_STARTED)):
        start.remote()


def _import_all() -> None:
    import gigatoken  # noqa: F401
    import ray.data  # noqa: F401


def check_alone() -> None:
    """Raises RuntimeError where this process belongs to a process group, whose other ranks would wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("a process group is alive in a process that tokenizes; shard before training starts")


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a Ray task, so that the driver holds none of what it reads."""
    import ray

    return ray.get(ray.remote(num_cpus=1)(function).remote(*arguments))


def spread(
    function: GroupFunction,
    work: ShardWork,
    units: Sequence[Unit],
    kind: type[AnyRecord],
) -> Iterator[tuple[int, AnyRecord]]:
    """Apply a function to groups of units over the cluster: records by unit, in any order. Raises what one raised."""
    if not units:
        return
    import ray

    groups = _grouped(units, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put((work, groups))  # once, not once a task: it holds every file's name

    def apply(row: dict[str, Any]) -> dict[str, Any]:
        task, todo = _fetch(shared)
        try:
            return {"records": json.dumps(run_group(function, task, todo[row["id"]])), "error": b""}
        except (TuneyardError, TokenizerDiffers) as error:  # as a value: Ray would wrap it and log its traceback
            return {"records": "[]", "error": pickle.dumps(error)}

    check_alone()
    with _quick_ray_data():
        done = ray.data.range(len(groups), override_num_blocks=len(groups)).map(apply, num_cpus=1)
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            for number, record in json.loads(row["records"]):
                yield number, kind.model_validate_json(record)


def run_group(function: GroupFunction, work: ShardWork, units: Sequence[Unit]) -> list[tuple[int, str]]:
    """Apply a function to some units, in the process of a task. Raises RuntimeError where a process group is alive."""
    check_alone()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core; the other tasks have the others
    before = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS, *before[1:])
    try:
        return list(function(work, units))
    finally:
        gc.set_threshold(*before)


def _grouped(units: Sequence[Unit], cpus: int) -> tuple[tuple[Unit, ...], ...]:
    """Units for one task each: several where there are many, so that writing one overlaps with reading the next."""
    size = min(max(len(units) // (cpus * TASKS_A_CPU), 1), UNITS_A_TASK)
    return tuple(tuple(units[start : start + size]) for start in range(0, len(units), size))


@lru_cache(maxsize=1)
def _fetch(shared: Any) -> tuple[ShardWork, tuple[tuple[Unit, ...], ...]]:
    """What the driver put into the object store, unpacked once a process."""
    import ray

    fetched: tuple[ShardWork, tuple[tuple[Unit, ...], ...]] = ray.get(shared)
    return fetched


@contextmanager
def _quick_ray_data() -> Iterator[None]:
    """Ray Data that starts on all cores at once, without bars and notes; the program shows progress itself."""
    import ray.data
    from ray.data._internal.execution.resource_manager import ResourceManager

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.ERROR)
    interval, ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = (
        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S,
        LIMITS_S,
    )
    try:
        yield
    finally:
        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = interval
        context.enable_progress_bars, context.print_on_execution_start, level = before
        logger.setLevel(level)
