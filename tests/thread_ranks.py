"""Ranks that are threads of this process: for what ranks tell each other, without torch.distributed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainers.errors import TuneyardError


class Alone:
    """A world of one rank, without a process group."""

    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]


class ThreadRanks:
    """One rank's end of a world of threads."""

    def __init__(self, rank: int, size: int, shared: dict[int, Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        self._shared[self.rank] = value
        self._barrier.wait()
        values = [self._shared[rank] for rank in range(self.size)]
        self._barrier.wait()
        return values


def run_threads(size: int, work: Callable[[int, ThreadRanks], Any]) -> list[Any]:
    """What each rank returned, or the error that a run would end or start again with."""
    barrier = threading.Barrier(size, timeout=600)
    shared: dict[int, Any] = {}

    def one(rank: int) -> Any:
        try:
            return work(rank, ThreadRanks(rank, size, shared, barrier))
        except (OSError, TuneyardError) as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
