"""Spreads the units of the data stage over the cluster as Ray tasks, and takes back one small record a unit.

Reading, tokenizing and writing a unit is one task, and all that travels is which units and what became of them. Not
Ray Data: its executor looks for finished tasks ten times a second, so that each core was idle for 0.16 s after a task
of 0.35 s, and begins with a single task for its first second. No pool of actors: on a small machine it leaves no core
to others. Ray does a task again whose worker or node died. Begin at `spread`.
"""

import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

from trainers.errors import TuneyardError
from trainers.records import Record
from trainers.shards.writer import ShardWork
from trainers.sources.readers import Unit
from trainers.tokenizer.gigatoken import TokenizerDiffers

SHARE, UNITS_A_TASK = 3, 32
"""A task takes a third of its core's part of what is left, and at most so many units: at its end a core waits for the
last sync, and at the end of the stage for the longest last task."""
AHEAD = 2
"""Tasks a core that Ray knows of, so that none waits for the driver between two."""
RETRIES = 3
CANCEL_S = 10.0
MOST_STARTED = 256
ALLOCATIONS = 200_000
"""New objects until Python looks for cycles. Rows have none, and to look every 700 objects took a seventh of a task."""
AnyRecord = TypeVar("AnyRecord", bound=Record)
GroupFunction = Callable[[ShardWork, Sequence[Unit]], Iterator[tuple[int, str]]]
Groups = tuple[tuple[Unit, ...], ...]


def start_workers() -> None:
    """Have a worker a core started, with what tasks import, while the driver reads the tokenizer: 2 s for each."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    start = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_import_all)
    for _ in range(min(cpus, MOST_STARTED)):
        start.remote()


def _import_all() -> None:
    import gigatoken  # noqa: F401


def check_alone() -> None:
    """Raises RuntimeError where this process belongs to a process group, whose other ranks would wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("a process group is alive in a process that tokenizes; shard before training starts")


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a Ray task, so that the driver holds none of what it reads."""
    import ray

    return ray.get(ray.remote(num_cpus=1)(function).remote(*arguments))


def map_units(
    function: GroupFunction,
    work: ShardWork,
    units: Sequence[Unit],
    kind: type[AnyRecord],
) -> Iterator[tuple[int, AnyRecord]]:
    """Apply a function to groups of units over the cluster: records by unit, in any order. Raises what one raised."""
    if not units:
        return
    import ray

    check_alone()
    groups = _grouped(units, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put((work, groups))  # once, not once a task: it holds every file's name
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_run_group)
    waiting = iter(range(len(groups)))
    running: list[Any] = []
    try:
        while True:
            room = AHEAD * int(ray.cluster_resources().get("CPU", 1)) - len(running)
            running += [task.remote(function, [shared], place) for place in islice(waiting, max(room, 0))]
            if not running:
                return
            (done,), running = ray.wait(running, num_returns=1)
            records, error = ray.get(done)
            if error:
                raise pickle.loads(error)
            for number, record in records:
                yield number, kind.model_validate_json(record)
    finally:
        _cancel(running)


def _cancel(running: Sequence[Any]) -> None:
    """End tasks whose results nobody takes any more, so that none goes on writing."""
    import ray

    for one in running:
        ray.cancel(one, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=CANCEL_S)


def _run_group(function: GroupFunction, shared: list[Any], place: int) -> tuple[list[tuple[int, str]], bytes]:
    """A task: records of one group. What it raises goes back as a value: Ray would wrap it and log its traceback."""
    work, groups = _fetch(shared[0])
    try:
        return run_group(function, work, groups[place]), b""
    except (TuneyardError, TokenizerDiffers) as error:
        return [], pickle.dumps(error)


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


def _grouped(units: Sequence[Unit], cpus: int) -> Groups:
    """Units for one task each: many at first, so that writing one overlaps with reading the next, few at the end."""
    groups, start = [], 0
    while start < len(units):
        size = min(max((len(units) - start) // (cpus * SHARE), 1), UNITS_A_TASK)
        groups.append(tuple(units[start : start + size]))
        start += size
    return tuple(groups)


@lru_cache(maxsize=1)
def _fetch(shared: Any) -> tuple[ShardWork, Groups]:
    """What the driver put into the object store, unpacked once a process."""
    import ray

    fetched: tuple[ShardWork, Groups] = ray.get(shared)
    return fetched
