"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): who copies whom, and with which values. Pure.

A generation is a stretch of steps that every member of the population trains. At its end the worst members take over
the checkpoint of one of the best, with that one's values changed a little. All members come to the end of a generation
before anything is decided, so the same spec and the same metrics give the same decisions whatever ran beside what.
"""

import math
import random
from collections.abc import Collection, Sequence
from typing import Any

from orchestrator.sweep.points import draw, in_range
from orchestrator.sweep.record import Copy, Trial
from orchestrator.sweep.spec import Range, SweepSpec
from trainers.errors import JobError
from trainers.tasks import Mode

FACTORS = (0.8, 1.2)
"""A number is multiplied by one of them; of a list the neighbour before or after is taken."""
RESAMPLED = 0.25
"""Chance that a value is drawn anew from the whole space instead."""
TRIES = 20
"""Explorations for values that are not just the parent's."""


def ends_of_generations(steps: int, every_steps: int, generations: int) -> tuple[int, ...]:
    """Steps at which members are compared, at checkpoints; the last generation ends with the training and has none.

    Raises:
        JobError: where there are fewer checkpoints than generations.
    """
    ends = {-(-steps * number // (generations * every_steps)) * every_steps for number in range(1, generations)}
    found = tuple(sorted(end for end in ends if end < steps))
    if len(found) < generations - 1:
        raise JobError(f"generations: {generations} in {steps} steps with a checkpoint every {every_steps} leave some "
                       "without a checkpoint at their end; ask for fewer, or lower checkpoint.every_steps")  # fmt: skip
    return found


def next_member(trials: Sequence[Trial], busy: Collection[int], decided: int) -> int | None:
    """The member that should train now, in a generation before which so many decisions were made; None where all have
    come to its end or are under way."""
    due = (one for one in trials if one.number not in busy and one.state in ("waiting", "paused"))
    return min((one.number for one in due if one.step < _end(one, decided)), default=None)


def is_over(trials: Sequence[Trial], busy: Collection[int], decided: int) -> bool:
    """Whether a generation has ended for every member and the next has not begun."""
    ends = max((len(trial.pauses) for trial in trials), default=0)
    return decided < ends and not busy and next_member(trials, busy, decided) is None


def _end(trial: Trial, decided: int) -> int:
    """The last step of a generation; of a member that was never begun any."""
    return trial.pauses[decided] if decided < len(trial.pauses) else max(trial.steps, 1)


def decide(spec: SweepSpec, trials: Sequence[Trial], decided: int, mode: Mode) -> tuple[Copy, ...]:
    """Who copies whom at the end of a generation: truncation selection, every draw from the seed.

    The metric at that very step counts, for it is what the copied checkpoint is worth. A member that failed copies
    too; one that early stopping ended neither copies nor is copied. Nobody does where none has a number.
    """
    sign = 1.0 if mode == "min" else -1.0
    step = max(trial.pauses[decided] for trial in trials if trial.pauses)
    members = [trial for trial in trials if trial.state != "trained"]
    values = {trial.number: value for trial in members if trial.state == "paused" and trial.step == step
              for at, value in trial.curve if at == step and math.isfinite(value)}  # fmt: skip
    ranked = sorted(values, key=lambda number: (sign * values[number], number))
    count = min(max(round(len(trials) * spec.quantile), 1), len(members) // 2)
    best, worst = ranked[:count], ranked[max(len(ranked) - count, count) :]
    lost = [trial.number for trial in members if trial.number not in values]
    copies = []
    for number in sorted([*worst, *lost]) if best else ():
        dice = random.Random(f"{spec.seed}/{decided}/{number}")
        chosen = dice.choice(best)
        parent = next(trial for trial in trials if trial.number == chosen)
        copies.append(Copy(generation=decided + 1, trial=number, parent=parent.number, step=step,
                           values=explore(spec, parent.values, dice)))  # fmt: skip
    return tuple(copies)


def explore(spec: SweepSpec, values: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A parent's values, each moved a little or drawn anew; others than the parent's where the space has others."""
    found = values
    for _ in range(TRIES):
        found = {field: _moved(values[field], given, dice) for field, given in spec.space.items()}
        if found != values:
            break
    return found


def _moved(value: Any, given: tuple[Any, ...] | Range, dice: random.Random) -> Any:
    if dice.random() < RESAMPLED:
        return draw(given, dice)
    if isinstance(given, Range):
        return in_range(value * dice.choice(FACTORS), given)
    place = given.index(value) + dice.choice((-1, 1))
    return given[min(max(place, 0), len(given) - 1)]
