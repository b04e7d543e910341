"""Turns of contenders that are alive at the same time: one step each, in a circle, so that what else the machine does
meets all of them alike. Begin at `Turns`; the other side is in `bench_loop.py`."""

import json
import os
import time
from dataclasses import dataclass


@dataclass
class Turns:
    """One rank's side: reads a byte before each step, writes a line after it."""

    go: int
    said: int
    """File descriptors."""
    first: float | None = None
    """The loss of the first step, once it is known."""
    _cpu_s: float | None = None
    _wall_s: float = 0.0

    def next(self, tokens: int) -> None:
        """The step before this call is done; the one after it begins when it may.

        What threads do between two turns counts as well: batches are made ahead.

        Args:
            tokens: of this rank in the step that is done, without padding.
        """
        if self._cpu_s is not None:
            step = {"cpu_s": time.process_time() - self._cpu_s, "wall_s": time.perf_counter() - self._wall_s}
            os.write(self.said, (json.dumps({**step, "tokens": tokens, "first": self.first}) + "\n").encode())
        self._cpu_s = time.process_time()
        os.read(self.go, 1)
        self._wall_s = time.perf_counter()
