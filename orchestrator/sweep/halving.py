"""Which trial goes on next, and how far: asynchronous successive halving (Li et al. 2020, arXiv:1810.05934). Pure.

Trials pause at a few steps, and the best 1/factor of those that have come there goes on. Unlike in the paper, every
trial is begun before one goes on, for their number is known here: fewer go on by chance.
"""

from collections.abc import Collection, Sequence

from orchestrator.sweep.record import Trial
from trainers.tasks import Mode


def pause_steps(
    steps: int, every_steps: int, factor: int | None, trials: int, most: int | None = None
) -> tuple[int, ...]:
    """Steps at which a trial pauses: 1/factor of the whole, 1/factor^2 ..., at checkpoints.

    Args:
        steps: of its whole training.
        every_steps: steps between checkpoints.
        factor: 1/factor goes on at a pause; None: no pauses.
        trials: in the sweep; no more pauses than leave one of them.
        most: pauses, the late ones.
    """
    pauses: list[int] = []
    while factor and factor ** (len(pauses) + 1) <= trials and (most is None or len(pauses) < most):
        share = factor ** (len(pauses) + 1) * every_steps
        pauses.insert(0, min(-(-steps // share) * every_steps, steps))
    return tuple(pauses)


def next_stop(trial: Trial) -> int | None:
    """The step at which the trial pauses next; None where it trains to its end."""
    return next((step for step in trial.pauses if trial.step < step < trial.steps), None)


def next_trial(trials: Sequence[Trial], busy: Collection[int], factor: int | None, mode: Mode) -> int | None:
    """The number of the trial that should train now; None where none can, until one of the busy ones stops."""
    waiting = [trial.number for trial in trials if trial.state == "waiting" and trial.number not in busy]
    if waiting or factor is None:
        return min(waiting, default=None)
    for level in reversed(range(max((len(trial.pauses) for trial in trials), default=0))):
        chosen = _promoted(trials, level, factor, mode, busy)
        free = [one for one in chosen if one.state == "paused" and _level(one) == level and one.number not in busy]
        if free:
            return free[0].number
    return None


def _promoted(trials: Sequence[Trial], level: int, factor: int, mode: Mode, busy: Collection[int]) -> list[Trial]:
    """The best of those that have come to a pause; at least one of them once no more will come."""
    here = [(trial, best) for trial in trials if trial.state != "failed" and _level(trial) >= level
            and (best := trial.best(mode, trial.pauses[level]))]  # fmt: skip
    more = any(trial.number in busy and _level(trial) < level for trial in trials)
    sign = 1.0 if mode == "min" else -1.0
    ranked = [trial for trial, best in sorted(here, key=lambda pair: (sign * pair[1][1], pair[0].number))]
    return ranked[: len(ranked) // factor or (0 if more else 1)]


def _level(trial: Trial) -> int:
    """Number of the last pause that the trial has come to, from 0; -1 before the first. Early stopping passes all."""
    return len(trial.pauses) - 1 if trial.state == "trained" else sum(step <= trial.step for step in trial.pauses) - 1
