"""Proposals of TPE: they learn, they can be repeated, they are new."""

import math
import sys

import pytest

from orchestrator.sweep.record import Trial
from orchestrator.sweep.spec import Range, SweepSpec
from orchestrator.sweep.tpe import check_optuna, propose
from trainers.errors import JobError

SPEC = SweepSpec(
    job="job.yaml",
    space={"train.learning_rate": Range(low=1e-6, high=1e-1, log=True), "train.schedule": ("cosine", "constant")},
    method="tpe",
    trials=30,
)


def trained(number: int, values: dict[str, object], value: float) -> Trial:
    return Trial(number=number, values=values, run="r", state="trained", step=8, steps=8, curve=((8, value),))


def test_proposals_come_near_the_best_and_are_the_same_each_time() -> None:
    pytest.importorskip("optuna")
    trials: list[Trial] = []
    for number in range(1, 31):
        values = propose(SPEC, trials, "max")
        assert values is not None and values == propose(SPEC, trials, "max")
        distance = abs(math.log10(values["train.learning_rate"]) + 3)
        trials.append(trained(number, values, -distance))
    best = max(best[1] for trial in trials if (best := trial.best("max")))
    late = [abs(math.log10(trial.values["train.learning_rate"]) + 3) for trial in trials[20:]]
    assert -best < 0.2
    assert sorted(late)[5] < 0.75, "half of the late ones are nearer than a quarter of the early draws"


def test_failed_trials_and_those_under_way_are_taken_in() -> None:
    pytest.importorskip("optuna")
    values = [{"train.learning_rate": rate, "train.schedule": "cosine"} for rate in (1e-2, 1e-3, 1e-4)]
    failed = Trial(number=1, values=values[0], run="r", state="failed", error="diverged")
    running = Trial(number=2, values=values[1], run="r")
    assert propose(SPEC, [failed, running], "min") is not None
    assert propose(SPEC, [failed, running, trained(3, values[2], 0.5)], "min") is not None


def test_a_space_with_nothing_new_gives_none() -> None:
    pytest.importorskip("optuna")
    spec = SPEC.model_copy(update={"space": {"train.seed": (1, [2])}})
    trials = [trained(1, {"train.seed": 1}, 0.1)]
    assert propose(spec, trials, "max") == {"train.seed": [2]}
    assert propose(spec, [*trials, trained(2, {"train.seed": [2]}, 0.2)], "max") is None


def test_a_missing_optuna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(JobError, match=r"tpe needs the package optuna: pip install 'tuneyard\[tpe\]'"):
        check_optuna()
