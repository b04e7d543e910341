"""Values for the next trial by Optuna's TPE, which learns from those before. Needs the extra `tpe`.

Pure: the study is made anew from the sweep's record each time, so that a killed sweep goes on as it would have.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from orchestrator.sweep.points import in_range
from orchestrator.sweep.record import Trial
from orchestrator.sweep.spec import Range, SweepSpec
from trainers.errors import JobError
from trainers.tasks import Mode

STARTUP_SHARE, MOST_STARTUP = 3, 10
"""A third of the trials, and no more than Optuna's own number, are drawn at random before it learns."""
TRIES = 20
"""Draws for a point that no trial has yet."""


def check_optuna() -> Any:
    """The package. Raises JobError that says how to get it."""
    try:
        import optuna
    except ImportError:
        raise JobError("method: tpe needs the package optuna: pip install 'tuneyard[tpe]'") from None
    return optuna


def propose(spec: SweepSpec, trials: Sequence[Trial], mode: Mode) -> dict[str, Any] | None:
    """The values of one more trial; None where the space seems to hold no others."""
    optuna = check_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {field: _distribution(optuna, given) for field, given in spec.space.items()}
    known = [one for trial in trials if (one := _as_known(optuna, space, spec, trial, trials, mode))]
    for attempt in range(TRIES):
        study = optuna.create_study(
            direction="minimize" if mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(
                seed=_seed(spec.seed, len(trials), attempt),
                n_startup_trials=min((spec.trials or 1) // STARTUP_SHARE, MOST_STARTUP),
                constant_liar=True,
            ),
        )
        study.add_trials(known)
        params = study.ask(space).params
        point = {field: _value(params[field], given) for field, given in spec.space.items()}
        if all(point != trial.values for trial in trials):
            return point
    return None


def _distribution(optuna: Any, given: tuple[Any, ...] | Range) -> Any:
    kinds = optuna.distributions
    if not isinstance(given, Range):
        return kinds.CategoricalDistribution([json.dumps(value, sort_keys=True) for value in given])
    whole = isinstance(given.low, int) and isinstance(given.high, int)
    kind = kinds.IntDistribution if whole else kinds.FloatDistribution
    return kind(given.low, given.high, log=given.log)


def _value(drawn: Any, given: tuple[Any, ...] | Range) -> Any:
    return in_range(drawn, given) if isinstance(given, Range) else json.loads(drawn)


def _as_known(
    optuna: Any, space: dict[str, Any], spec: SweepSpec, trial: Trial, trials: Sequence[Trial], mode: Mode
) -> Any:
    """A trial as Optuna's; one that failed counts as the worst, one under way as such."""
    values = [best[1] for one in trials if (best := one.best(mode))]
    best = trial.best(mode)
    if best is None and trial.state != "waiting" and not values:
        return None
    worst = (max if mode == "min" else min)(values, default=0.0)
    running = best is None and trial.state == "waiting"
    params = {field: value if isinstance(spec.space[field], Range) else json.dumps(value, sort_keys=True)
              for field, value in trial.values.items()}  # fmt: skip
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        params=params,
        distributions=space,
        value=None if running else best[1] if best else worst,
        state=states.RUNNING if running else states.COMPLETE,
    )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
