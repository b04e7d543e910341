"""Population-based training: who copies whom, over whole populations played without training."""

import random
from typing import Any

import pytest

from orchestrator.sweep.population import decide, ends_of_generations, explore, is_over, next_member
from orchestrator.sweep.record import Stretch, Trial
from orchestrator.sweep.spec import Range, SweepSpec
from trainers.errors import JobError

SPACE = {
    "train.learning_rate": Range(low=1e-5, high=1e-2, log=True),
    "train.schedule": ("linear", "cosine", "constant"),
}
SPEC = SweepSpec(job="job.yaml", space=SPACE, method="population", trials=8, generations=3)
ENDS = (8, 16)


def member(number: int, *curve: tuple[int, float], **more: Any) -> Trial:
    values = {"train.learning_rate": number / 1000, "train.schedule": "cosine"}
    step = curve[-1][0] if curve else 0
    state = "paused" if curve else "waiting"
    given = {"number": number, "values": values, "run": f"r{number}", "steps": 24, "step": step, "pauses": ENDS}
    return Trial.model_validate({**given, "state": state, "curve": curve, **more})


def test_generations_end_at_even_shares_of_the_training_at_checkpoints() -> None:
    assert ends_of_generations(24, 4, 3) == (8, 16)
    assert ends_of_generations(100, 8, 4) == (32, 56, 80)
    assert ends_of_generations(10, 1, 2) == (5,)


@pytest.mark.parametrize(("steps", "every", "generations"), [(8, 4, 3), (6, 6, 2), (24, 20, 3)])
def test_more_generations_than_checkpoints_are_refused(steps: int, every: int, generations: int) -> None:
    with pytest.raises(JobError, match=f"generations: {generations} in {steps} steps"):
        ends_of_generations(steps, every, generations)


def test_nobody_goes_on_before_all_have_come_to_the_end_of_a_generation() -> None:
    trials = [member(1, (8, 0.5)), member(2), member(3)]
    assert next_member(trials, (), 0) == 2 and next_member(trials, (2,), 0) == 3
    assert next_member(trials, (2, 3), 0) is None and not is_over(trials, (2, 3), 0)
    trials = [member(1, (8, 0.5)), member(2, (8, 0.1)), member(3, state="failed")]
    assert is_over(trials, (), 0) and next_member(trials, (), 0) is None
    assert next_member(trials, (), 1) == 1 and not is_over(trials, (), 1)
    ended = [member(1, (16, 0.5)), member(2, (16, 0.5))]
    assert next_member(ended, (), 2) == 1, "on to the last step"
    assert not is_over([one.model_copy(update={"state": "trained", "step": 24}) for one in ended], (), 2)


def test_a_member_that_was_never_begun_trains_first() -> None:
    assert next_member([member(1, steps=0, pauses=())], (), 0) == 1


def test_the_worst_quarter_copies_from_the_best_quarter() -> None:
    trials = [member(number, (8, number / 10)) for number in range(1, 9)]
    copies = decide(SPEC, trials, 0, "max")
    assert [copy.trial for copy in copies] == [1, 2] and {copy.parent for copy in copies} <= {7, 8}
    assert all((copy.step, copy.generation) == (8, 1) for copy in copies)
    assert [copy.trial for copy in decide(SPEC, trials, 0, "min")] == [7, 8]
    parents = {copy.parent for seed in range(9)
               for copy in decide(SPEC.model_copy(update={"seed": seed}), trials, 0, "max")}  # fmt: skip
    assert parents == {7, 8}, "drawn, not always the best"


def test_the_same_metrics_give_the_same_decisions_and_another_seed_others() -> None:
    trials = [member(number, (8, number / 10)) for number in range(1, 9)]
    shuffled = random.Random(0).sample(trials, 8)
    assert decide(SPEC, trials, 0, "max") == decide(SPEC, shuffled, 0, "max")
    assert decide(SPEC, trials, 0, "max") != decide(SPEC.model_copy(update={"seed": 1}), trials, 0, "max")


def test_the_metric_at_the_end_of_the_generation_counts_and_no_better_one_before() -> None:
    trials = [member(1, (4, 0.9), (8, 0.1)), member(2, (4, 0.1), (8, 0.5)), member(3, (8, 0.4)), member(4, (8, 0.3))]
    (copy,) = decide(SPEC, trials, 0, "max")
    assert (copy.trial, copy.parent) == (1, 2)


def test_who_failed_or_has_no_number_copies_too_and_who_stopped_early_is_left_alone() -> None:
    trials = [
        member(1, (8, 0.5)),
        member(2, (8, 0.4)),
        member(3, (4, 0.9), state="failed"),
        member(4, (8, float("nan"))),
        member(5, (4, 0.99), state="trained"),
        member(6, (8, 0.3)),
        member(7, (4, 0.95), step=8),
    ]
    copies = decide(SPEC, trials, 0, "max")
    assert [copy.trial for copy in copies] == [3, 4, 6, 7] and {copy.parent for copy in copies} <= {1, 2}
    assert decide(SPEC, [member(1, state="failed"), member(2, state="failed")], 0, "max") == ()
    assert decide(SPEC, [member(1, (8, 0.5))], 0, "max") == ()


def test_two_members_are_a_population() -> None:
    (copy,) = decide(SPEC, [member(1, (8, 0.5)), member(2, (8, 0.6))], 0, "max")
    assert (copy.trial, copy.parent) == (1, 2)


def test_values_move_by_a_fifth_or_to_a_neighbour_or_are_drawn_anew_within_their_bounds() -> None:
    values = {"train.learning_rate": 9e-3, "train.schedule": "linear"}
    found = [explore(SPEC, values, random.Random(seed)) for seed in range(400)]
    rates = [one["train.learning_rate"] for one in found]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates) and values not in found
    assert rates.count(7.2e-3) + rates.count(1e-2) in range(250, 350), "three of four; 1.2 ends at the bound"
    schedules = [one["train.schedule"] for one in found]
    assert schedules.count("cosine") > schedules.count("constant") > 0, "a neighbour more often than the farthest"
    corner = {"train.learning_rate": 1e-2, "train.schedule": "linear"}
    assert all(explore(SPEC, corner, random.Random(seed)) != corner for seed in range(200)), "moved on from the bounds"
    only = SPEC.model_copy(update={"space": {"train.schedule": ("linear",)}})
    assert explore(only, {"train.schedule": "linear"}, random.Random(0)) == {"train.schedule": "linear"}


def test_a_line_travels_with_the_record() -> None:
    line = (Stretch(trial=2, run="r2", values={"train.learning_rate": 1e-3}, step=8, digest="0" * 32),)
    again = Trial.model_validate_json(member(1, (8, 0.5), line=line).model_dump_json())
    assert again.line == line
