"""How much of each step a rank worked, and how much it waited for others: what tells a straggler from its victims.

ZeRO-3 makes every rank wait in a collective for the slowest, so step times are equal everywhere. A thread looks about
50 times a step, at most 25 times a second, whether the rank stands in a collective; a look may take the interpreter
from the step for a moment. On GPUs, where the host runs ahead of the device, it sees the host's waiting alone.
"""

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

INTERVAL_S, LONGEST_S = 0.04, 1.0
"""Least and most time between two looks."""
LOOKS = 50
"""Looks a step, where it is long enough. Over a window of steps the share of work is then known to 0.013."""
DEPTH = 8
"""Frames above the innermost that are looked at."""
COLLECTIVE_FILES = ("torch/distributed/", "deepspeed/comm/")
SETTLING = ("trainers/training/loop.py", "_settle")
WINDOW = 20
"""Steps over which a straggler must lag."""
LAG_SHARE, LAG_S = 0.1, 0.05
"""A rank lags when it works longer than the least busy one by this share of the step, and by this time."""


def in_collective(frames: Sequence[tuple[str, str]]) -> bool:
    """Whether a stack, innermost (file, function) first, waits for other ranks. On a GPU collectives only queue up, and
    the host waits for them where it asks for the step's numbers."""
    if frames and frames[0][1] == SETTLING[1] and frames[0][0].endswith(SETTLING[0]):
        return True
    return any(
        any(part in file for part in COLLECTIVE_FILES) or (function == "wait" and "deepspeed" in file)
        for file, function in frames[:DEPTH]
    )


class ComputeSampler:
    """Samples the calling thread's stack until it is closed."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._busy = self._looks = 0
        self._since, self._interval_s = time.perf_counter(), INTERVAL_S
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="busy-meter", daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._looks += 1
            self._busy += not in_collective(self._stack())

    def _stack(self) -> list[tuple[str, str]]:
        """Names alone: a frame that is kept while this thread sleeps would keep an engine that is let go of."""
        return _frames(sys._current_frames().get(self._thread))

    def share(self) -> float:
        """Share of the time since the last call that was not spent waiting for other ranks."""
        looks, busy = self._looks, self._busy
        self._looks = self._busy = 0
        began, self._since = self._since, time.perf_counter()
        self._interval_s = min(max((self._since - began) / LOOKS, INTERVAL_S), LONGEST_S)
        return busy / looks if looks else 1.0

    def close(self) -> None:
        """Stop sampling; no frame is held from then on."""
        self._closed.set()
        self._sampler.join()


def _frames(frame: FrameType | None) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while frame is not None and len(found) < DEPTH:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    lag_s: float
    """Median time a step that it works longer than the least busy rank."""


class StragglerDetector:
    """Keeps each rank's work over the last steps."""

    def __init__(self, world_size: int) -> None:
        self._busy: list[deque[float]] = [deque(maxlen=WINDOW) for _ in range(world_size)]
        self._steps: deque[float] = deque(maxlen=WINDOW)

    def note(self, step_s: float, busy_s: Sequence[float]) -> Straggler | None:
        """Take in one step; the rank that lags, once half a window is known."""
        self._steps.append(step_s)
        for times, seconds in zip(self._busy, busy_s, strict=True):
            times.append(seconds)
        if len(self._steps) < WINDOW // 2 or len(self._busy) < 2:
            return None
        means = [statistics.fmean(times) for times in self._busy]
        slowest = max(range(len(means)), key=means.__getitem__)
        lag = means[slowest] - min(means)
        over = lag > max(LAG_S, LAG_SHARE * statistics.fmean(self._steps))
        return Straggler(slowest, lag) if over else None
