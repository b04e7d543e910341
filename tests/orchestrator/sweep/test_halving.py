"""Which trial goes on: over whole sweeps, played without training."""

import random
from pathlib import Path

import pytest

from orchestrator.sweep.halving import next_stop, next_trial, pause_steps
from orchestrator.sweep.record import Trial
from orchestrator.sweep.spec import SweepSpec
from orchestrator.sweep.sweep import pauses_of
from tests.tiny import film_rows, tiny_job
from trainers.job.sections import ContinueSection


def play(quality: list[float], factor: int | None, at_once: int, steps: int = 810, every: int = 45) -> list[Trial]:
    """Train the trials of a sweep, each with a fixed metric, so many beside each other, ending in a random order."""
    pauses = pause_steps(steps, every, factor, len(quality))
    trials = [Trial(number=n, values={}, run="r", steps=steps, pauses=pauses) for n in range(1, len(quality) + 1)]
    busy: list[int] = []
    dice = random.Random(len(quality) * at_once)
    while True:
        while len(busy) < at_once and (number := next_trial(trials, busy, factor, "max")) is not None:
            busy.append(number)
        if not busy:
            return trials
        trial = trials[busy.pop(dice.randrange(len(busy))) - 1]
        stop = next_stop(trial)
        end = {"step": stop or steps, "state": "paused" if stop else "trained"}
        curve = (*trial.curve, (end["step"], quality[trial.number - 1]))
        trials[trial.number - 1] = trial.model_copy(update={**end, "curve": curve})


def test_pauses_are_shares_of_the_whole_at_checkpoints() -> None:
    assert pause_steps(810, 45, 3, 12) == (90, 270)
    assert pause_steps(100, 8, 3, 12) == (16, 40)
    assert pause_steps(810, 45, 3, 12, 1) == (270,) and pause_steps(810, 45, 3, 12, 9) == (90, 270)
    assert pause_steps(810, 45, 3, 2) == () == pause_steps(810, 45, None, 12)
    assert pause_steps(6, 4, 3, 27) == (4, 4, 4)


def test_trials_that_begin_at_another_runs_checkpoint_pause_after_it(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, tmp_path / "model", "classify", film_rows(10), checkpoint={"every_steps": 45})
    train = {"continue_from": ContinueSection(run="r", step=90)}
    later = job.model_copy(update={"train": job.train.model_copy(update=train)})
    halving = SweepSpec(job="j", space={}, halving=3)
    assert pauses_of(halving, job, 810, 12) == (90, 270) and pauses_of(halving, later, 810, 12) == (270,)
    population = SweepSpec(job="j", space={}, method="population", generations=9)
    assert pauses_of(population, job, 810, 12)[0] == 90 and pauses_of(population, later, 810, 12)[0] == 180


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_the_best_trial_comes_to_the_end_for_less_than_half_the_steps(at_once: int) -> None:
    for seed in range(20):
        quality = random.Random(seed).sample(range(100), 12)
        trials = play([float(value) for value in quality], 3, at_once)
        best = max(trials, key=lambda trial: quality[trial.number - 1])
        assert best.state == "trained"
        assert sum(trial.step for trial in trials) <= 0.5 * sum(trial.steps for trial in trials)


def test_one_at_a_time_exactly_a_third_goes_on() -> None:
    trials = play([float(value) for value in range(12)], 3, 1)
    assert sorted(trial.step for trial in trials) == [90] * 8 + [270] * 3 + [810]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_small_sweeps_end_with_a_trained_trial(count: int) -> None:
    trials = play([float(value) for value in range(count)], 3, 2)
    assert trials[-1].state == "trained"


def test_without_halving_every_trial_trains_to_its_end() -> None:
    assert {trial.step for trial in play([1.0, 2.0, 3.0], None, 2)} == {810}


def test_a_trial_that_failed_or_has_no_number_holds_up_nobody() -> None:
    pauses = (8,)
    good = Trial(number=1, values={}, run="a", state="paused", steps=16, step=8, pauses=pauses, curve=((8, 0.5),))
    failed = good.model_copy(update={"number": 2, "state": "failed", "curve": ((4, 0.9),)})
    nan = good.model_copy(update={"number": 3, "curve": ((8, float("nan")),)})
    assert next_trial([good, failed, nan], (), 2, "max") == 1
    assert next_trial([failed, nan], (), 2, "max") is None


def test_early_stopping_counts_as_having_come_to_every_pause() -> None:
    stopped = Trial(number=1, values={}, run="a", state="trained", steps=16, step=4, pauses=(8,), curve=((4, 0.9),))
    other = Trial(number=2, values={}, run="b", state="paused", steps=16, step=8, pauses=(8,), curve=((8, 0.5),))
    assert next_trial([stopped, other], (), 2, "max") is None
