"""A rank's heartbeat: where it is and since when, on a page of memory that its node agent reads even while the rank
hangs.

The rank writes, the node agent reads; the node agent's one word back is the wish to stop. Plain stores into a mapped
file: no call that could block, no lock that a stopped process could hold.
"""

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from trainers.records import PHASES, STOPS, Phase, StopReason

_BEAT = struct.Struct("<qqd")
_STOP = struct.Struct("<q")
_STOP_AT, _TOLD_AT = 64, 72
_SIZE = 128


@dataclass(frozen=True)
class Heartbeat:
    """What a rank said last of where it is."""

    step: int
    """The step it is in, counted from 0."""
    phase: Phase
    age_s: float
    """Seconds since it entered that phase."""
    told: bool = False
    """Whether it got SIGTERM; the others must hear of it too, for it may be waiting for them."""


class HeartbeatPage:
    """One rank's page; both sides open the same file. CLOCK_MONOTONIC is one clock for all processes of a host."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _SIZE)

    def beat(self, phase: Phase, step: int) -> None:
        """The rank enters a phase."""
        _BEAT.pack_into(self._page, 0, step, PHASES.index(phase), time.monotonic())

    def read(self) -> Heartbeat:
        """The last beat."""
        step, phase, since = _BEAT.unpack_from(self._page, 0)
        (told,) = _STOP.unpack_from(self._page, _TOLD_AT)
        return Heartbeat(step, PHASES[phase], time.monotonic() - since, bool(told))

    def tell(self) -> None:
        """The rank got SIGTERM."""
        _STOP.pack_into(self._page, _TOLD_AT, 1)

    def ask_to_stop(self, reason: StopReason) -> None:
        """The node agent asks the rank to stop at the end of its step."""
        _STOP.pack_into(self._page, _STOP_AT, STOPS.index(reason) + 1)

    def stop_reason(self) -> StopReason | None:
        """What the rank was asked."""
        (code,) = _STOP.unpack_from(self._page, _STOP_AT)
        return STOPS[code - 1] if code else None
