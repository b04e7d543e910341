"""Where the wall time went, and where it will go: an account of a run's events, and a simulator of failures.

The account cuts the time of a run into pieces without gap or overlap, so its sum is the wall time. The simulator plays
a training with failures at random times; what it says is checked against published runs in its test.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trainers.errors import JobError
from trainers.run.events import (
    CheckpointEvent,
    EvaluationEvent,
    Event,
    RestartEvent,
    RolledBackEvent,
    StageEvent,
    StageStartEvent,
    StartEvent,
    StepEvent,
)

KINDS = ("shard", "startup", "productive", "data_wait", "checkpoint", "evaluated", "recomputed", "restart",
         "evaluation", "register")  # fmt: skip
"""startup: from the begin of the training to its first step. restart: from a rank's last step before a failure to the
first step after it. recomputed: steps that were done again. checkpoint: what saving held up the steps, and the wait for
the last commit. evaluated: the ranks scored a checkpoint in place of training; evaluation: what was left after it."""
STAGES = {"shard": "shard", "evaluate": "evaluation", "register": "register"}


def account(events: Sequence[Event]) -> dict[str, float]:
    """Seconds by kind, over all attempts of a run; time in which no driver was alive is not the run's.

    Events count by their time, not by their place: a controller that was killed hears of its last steps in the next
    attempt.
    """
    events = sorted(events, key=lambda event: event.time)
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if isinstance(event, StageEvent) and event.stage in STAGES:
            spent[STAGES[event.stage]] += event.seconds
    last_try = {event.step: number for number, event in enumerate(events) if isinstance(event, StepEvent)}
    for begin, end, session in _training_sessions(events):
        _account_session(begin, end, session, last_try, spent)
    return spent


def _training_sessions(events: Sequence[Event]) -> list[tuple[float, float, list[tuple[int, Event]]]]:
    """(begin, end, numbered events) of each time that the training stage ran."""
    sessions: list[tuple[float, float, list[tuple[int, Event]]]] = []
    begin: float | None = None
    inside: list[tuple[int, Event]] = []
    for number, event in enumerate(events):
        starts = isinstance(event, StageStartEvent) and event.stage == "train"
        ends = isinstance(event, StageEvent) and event.stage == "train"
        if begin is not None and (starts or ends):  # a driver that was killed has no end: its last event is it
            sessions.append((begin, event.time if ends else max(inside[-1][1].time, begin), inside))
            begin = None
        if starts:
            begin, inside = event.time, [(number, event)]
        elif begin is not None:
            inside.append((number, event))
    if begin is not None:
        sessions.append((begin, max(inside[-1][1].time, begin), inside))
    return sessions


def _account_session(
    begin: float, end: float, session: Sequence[tuple[int, Event]], last_try: dict[int, int], spent: dict[str, float]
) -> None:
    """Walk from step to step; what lies between two is a restart where a launch began in it, else a save."""
    at, gap = begin, "startup"
    for number, event in session:
        if isinstance(event, RestartEvent | RolledBackEvent) or (isinstance(event, StartEvent) and gap == "checkpoint"):
            gap = "restart"
        if isinstance(event, EvaluationEvent) and event.held_s and event.time <= end:
            started = max(event.time - event.held_s, at)
            spent[gap] += started - at
            spent["evaluated"] += event.time - started
            at = event.time
        if not isinstance(event, StepEvent) or event.time > end:
            continue
        started = max(min(event.time - event.step_s, event.time), at)
        spent[gap] += started - at
        waited = min(event.data_wait_s, event.time - started)
        spent["data_wait"] += waited
        kind = "productive" if last_try[event.step] == number else "recomputed"
        spent[kind] += event.time - started - waited
        at, gap = max(event.time, at), "checkpoint"
    spent[gap] += max(end - at, 0.0)


def share(spent: dict[str, float]) -> float:
    """Goodput: the share of the training's time that went into steps that count."""
    training = sum(seconds for kind, seconds in spent.items() if kind not in STAGES.values())
    return spent["productive"] / training if training else 0.0


@dataclass(frozen=True)
class Measured:
    """What a run tells of itself."""

    world_size: int
    step_s: float
    """Median seconds of a step."""
    save_s: float
    """Mean seconds that a save held up the steps."""
    restart_s: float
    """Mean seconds from a failure to the next step; where none failed, from the launch to the first."""


def measure(events: Sequence[Event]) -> Measured:
    """The figures that a forecast needs. Raises JobError where the run took no step yet."""
    steps = [event.step_s for event in events if isinstance(event, StepEvent)]
    starts = [event for event in events if isinstance(event, StartEvent)]
    saves = [event.blocked_s + event.wait_s for event in events if isinstance(event, CheckpointEvent)]
    if not steps or not starts:
        raise JobError("the run took no step yet, so nothing is known of its speed")
    spent, restarts = account(events), len(starts) - 1
    return Measured(
        world_size=starts[-1].world_size,
        step_s=max(statistics.median(steps), 1e-6),
        save_s=max(statistics.fmean(saves), 0.001) if saves else 1.0,
        restart_s=spent["restart"] / restarts if restarts else spent["startup"],
    )


@dataclass(frozen=True)
class Cluster:
    """What decides how much a cluster loses."""

    nodes: int
    node_mtbf_h: float
    """Mean time between failures of one node, hours."""
    save_s: float
    """How long a save holds up the steps."""
    restart_s: float
    """From a failure to the first step after it."""

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of the whole, seconds."""
        return self.node_mtbf_h * 3600 / self.nodes


def best_interval_s(cluster: Cluster) -> float:
    """Seconds between saves that lose the least (Daly 2006, doi:10.1016/j.future.2004.11.016, first order with
    Young's square root)."""
    if cluster.save_s >= 2 * cluster.mtbf_s:
        return cluster.mtbf_s
    return max(math.sqrt(2 * cluster.save_s * cluster.mtbf_s) - cluster.save_s, cluster.save_s)


def allowed_goodput(cluster: Cluster, interval_s: float) -> float:
    """Expected share of useful time, for failures without memory (Daly 2006, eq. 20).

    A stretch of interval + save takes e^(R/M) M (e^((interval + save)/M) - 1) on the average.
    """
    mtbf = cluster.mtbf_s
    stretch = math.exp(cluster.restart_s / mtbf) * mtbf * math.expm1((interval_s + cluster.save_s) / mtbf)
    return interval_s / stretch


def simulate(cluster: Cluster, interval_s: float, useful_s: float, seed: int = 0) -> float:
    """Share of useful time in one played training: failures come at random, also while restarting."""
    draw = random.Random(seed)
    clock = trained = 0.0
    next_failure = draw.expovariate(1 / cluster.mtbf_s)
    while trained < useful_s:
        work = min(interval_s, useful_s - trained)
        stretch = work + cluster.save_s
        if clock + stretch <= next_failure:
            clock, trained = clock + stretch, trained + work
            continue
        clock = next_failure
        next_failure = clock + draw.expovariate(1 / cluster.mtbf_s)
        while clock + cluster.restart_s > next_failure:
            clock = next_failure
            next_failure = clock + draw.expovariate(1 / cluster.mtbf_s)
        clock += cluster.restart_s
    return trained / clock


def forecast(cluster: Cluster) -> list[dict[str, float]]:
    """Expected goodput at the best interval between saves and at others, each also played through."""
    best = best_interval_s(cluster)
    rows = []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        interval = best * factor
        played = simulate(cluster, interval, useful_s=300 * cluster.mtbf_s)
        rows.append({"interval_s": round(interval, 1), "of_best": factor,
                     "expected": round(allowed_goodput(cluster, interval), 4),
                     "simulated": round(played, 4)})  # fmt: skip
    return rows
