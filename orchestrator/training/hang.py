"""Whether the ranks hang, and who is to blame. Pure: the controller brings beats and stacks, this reads them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainers.checkpoint.checkpointer import LAST_S
from trainers.records import PHASES
from trainers.worker.heartbeat import Heartbeat
from trainers.worker.stack_dump import Frame, code_line, parse_stacks, waits_for_others

LOAD_S = 1800.0
"""Loading may take this long."""
STEPS, LEAST_S = 20.0, 60.0
"""auto: this many median steps, and never less than that."""
LONG_PHASES = {"start": LOAD_S, "load": LOAD_S, "save": LOAD_S, "evaluate": LOAD_S, "commit": 2 * LAST_S + LOAD_S}
"""Seconds of phases without a usual length. Of an evaluation, each batch counts by itself; a rank that waits for a
commit, and for that of a save that was left out for it, gives up by itself."""


@dataclass(frozen=True)
class Standing:
    """Where one rank was found."""

    rank: int
    beat: Heartbeat
    state: str
    """The process state as /proc has it: T is stopped."""
    line: Frame | None
    waits: bool
    """Whether it stands in a collective, waiting for others."""

    def __str__(self) -> str:
        state = "stopped by a signal, " if self.state in ("T", "t") else ""
        return f"rank {self.rank}: {state}step {self.beat.step + 1}, phase {self.beat.phase}, at {self.line}"


@dataclass(frozen=True)
class HangReport:
    """Who holds up the others, and where everyone stands."""

    culprit: Standing
    why: str
    standings: tuple[Standing, ...]

    def __str__(self) -> str:
        others = "; ".join(str(one) for one in self.standings if one is not self.culprit)
        return f"{self.culprit}: {self.why}" + (f". Others: {others}" if others else "")


def threshold_s(hang_after_s: float | Literal["auto"], step_times: list[float], beat: Heartbeat) -> float:
    """Seconds in one phase after which a rank hangs."""
    if hang_after_s != "auto":
        return max(hang_after_s, LONG_PHASES.get(beat.phase, 0.0))
    if beat.phase in LONG_PHASES or not step_times:
        return LONG_PHASES.get(beat.phase, LOAD_S)
    return max(STEPS * statistics.median(step_times), LEAST_S)


def is_hung(beats: Mapping[int, Heartbeat], hang_after_s: float | Literal["auto"], step_times: list[float]) -> bool:
    """Whether no rank has moved for longer than its phase allows: one that moves will move the others."""
    return bool(beats) and all(beat.age_s > threshold_s(hang_after_s, step_times, beat) for beat in beats.values())


def stand(rank: int, beat: Heartbeat, state: str, stacks: str) -> Standing:
    """One rank, out of what was read of it."""
    threads = parse_stacks(stacks)
    return Standing(rank, beat, state, code_line(threads), waits_for_others(threads))


def blame(standings: list[Standing]) -> HangReport:
    """The rank that the others wait for.

    In this order: one that is stopped; one that is not in a collective while others are; where all are, the one whose
    place differs: ahead of the others it left a collective out, behind them it waits for what they passed.
    """
    stopped = [one for one in standings if one.state in ("T", "t")]
    if stopped:
        return HangReport(stopped[0], "its process is stopped", tuple(standings))
    free = [one for one in standings if not one.waits]
    if free:
        furthest_back = min(free, key=_position)
        return HangReport(furthest_back, "the others wait for it in a collective", tuple(standings))
    odd = _odd_one(standings)
    return HangReport(odd, "it waits in another collective than the others, so one was skipped", tuple(standings))


def _position(one: Standing) -> tuple[int, int]:
    return one.beat.step, PHASES.index(one.beat.phase)


def _odd_one(standings: list[Standing]) -> Standing:
    """The rank in the smallest (step, phase, line) group; ties: the rank furthest ahead."""
    places = [(one.beat.step, one.beat.phase, str(one.line)) for one in standings]
    order = sorted(
        zip(standings, places, strict=True), key=lambda pair: (places.count(pair[1]), *(-n for n in _position(pair[0])))
    )
    return order[0][0]
