"""Spreads the data stage over the cluster as Ray tasks, each of which gives back a few small records.

Reading, tokenizing and writing a unit is one task, and all that travels is which units and what became of them. Not
Ray Data: its executor looks for finished tasks ten times a second, so that each core was idle for 0.16 s after a task
of 0.35 s, and begins with a single task for its first second. No pool of actors: on a small machine it leaves no core
to others. Ray does a task again whose worker or node died. Begin at `map_tasks`.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from orchestrator.ray_session import ANYWHERE
from trainers.errors import TuneyardError, from_record, to_record
from trainers.shards.writer import ShardWork
from trainers.sources.readers import Unit

SHARE, UNITS_A_TASK = 3, 32
"""Guided self-scheduling: a task takes remaining / (3 x cores) units, at most 32, so that the last tasks are short."""
AHEAD = 2
"""Tasks a core that Ray knows of, so that none waits for the driver between two."""
RETRIES = 3
CANCEL_S = 10.0
MOST_STARTED = 256
ALLOCATIONS = 200_000
"""New objects until Python looks for cycles. Rows have none, and to look every 700 objects took a seventh of a task."""
Shared = TypeVar("Shared")
Part = TypeVar("Part")
Result = TypeVar("Result")


def start_workers() -> None:
    """Have a worker a core started, with what tasks import, while the driver reads the tokenizer: 2 s for each."""
    import ray

    start = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_import_all)
    for _ in range(min(_cluster_cpus(), MOST_STARTED)):
        start.remote()


def _import_all() -> None:
    import gigatoken  # noqa: F401


def check_alone() -> None:
    """Raises RuntimeError where this process belongs to a process group, whose other ranks would wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("a process group is alive in a process that tokenizes; shard before training starts")


def map_units(
    function: Callable[[ShardWork, Sequence[Unit]], list[tuple[int, Result]]],
    work: ShardWork,
    units: Sequence[Unit],
    here: bool = False,
) -> Iterator[tuple[int, Result]]:
    """Apply a function to groups of units over the cluster: results by unit, in any order. Raises what one raised.

    Groups are large at first, so that writing one unit overlaps with reading the next, and small at the end.
    """
    cpus, groups, start = _cluster_cpus() if units and not here else 1, [], 0
    while start < len(units):
        size = min(max((len(units) - start) // (cpus * SHARE), 1), UNITS_A_TASK)
        groups.append(units[start : start + size])
        start += size
    for _, results in map_tasks(function, work, groups, here):
        yield from results


def map_tasks(
    function: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], here: bool = False
) -> Iterator[tuple[int, Result]]:
    """Apply a function to each part over the cluster: results with the part's index, in any order.

    Args:
        shared: its first argument, the same for all; sent once.
        here: in this process, one part after another, without a cluster.

    Raises:
        TuneyardError, TokenizerDiffers: what one of the tasks raised; the others are ended.
    """
    if here or not parts:
        yield from ((index, run_task(function, shared, part)) for index, part in enumerate(parts))
        return
    import ray

    check_alone()
    reference = ray.put(shared)
    task = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy=ANYWHERE)(_run_remotely)
    waiting = iter(enumerate(parts))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < AHEAD * _cluster_cpus() and (following := next(waiting, None)):
                index, part = following
                running[task.remote(function, [reference], part)] = index
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            result, error = ray.get(done)
            if error:
                raise from_record(error)
            yield index, result
    finally:
        for reference_of_task in running:  # results that nobody takes any more: none may go on writing
            ray.cancel(reference_of_task, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_S)


def _cluster_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def _run_remotely(function: Callable[[Any, Any], Any], shared: list[Any], part: Any) -> tuple[Any, dict[str, Any]]:
    """A task. What it raises goes back as a value: Ray would wrap it and log its traceback."""
    try:
        return run_task(function, _fetch(shared[0]), part), {}
    except TuneyardError as error:
        return None, to_record(error)


def run_task(function: Callable[[Shared, Part], Result], shared: Shared, part: Part) -> Result:
    """Call a function as the process of a task does. Raises RuntimeError where a process group is alive."""
    check_alone()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core; the other tasks have the others
    before = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS, *before[1:])
    try:
        return function(shared, part)
    finally:
        gc.set_threshold(*before)


@lru_cache(maxsize=1)
def _fetch(reference: Any) -> Any:
    """What the driver put into the object store, unpacked once a process."""
    import ray

    return ray.get(reference)
