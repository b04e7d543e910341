"""Batch arithmetic and the learning rate."""

import math

import pytest

from trainers.batching.batch_plan import plan_batches
from trainers.errors import JobError
from trainers.training.schedule import Schedule


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_the_global_batch_is_the_same_at_any_world_size(world_size: int) -> None:
    plan = plan_batches(64, "auto", world_size, 1024)
    assert plan.world_size * plan.micro_batch_size * plan.accumulation == 64
    assert plan.micro_batch_size <= 4  # 4,096 tokens


def test_auto_takes_one_sequence_where_even_that_is_over_the_bound() -> None:
    assert plan_batches(8, "auto", 2, 100_000).micro_batch_size == 1


def test_a_world_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        JobError, match=r"global_batch_size \(12\) must be divisible by the world size \(5\).*\[1, 2, 3, 4, 6, 12\]"
    ):
        plan_batches(12, "auto", 5, 128)


def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(JobError, match=r"= 6 must be divisible by train.micro_batch_size \(4\).*\[1, 2, 3, 6\]"):
        plan_batches(12, 4, 2, 128)


@pytest.mark.parametrize("sharing", [2, 4, 8])
def test_groups_that_share_sequences_count_once_each(sharing: int) -> None:
    plan = plan_batches(64, "auto", 16, 4096 * sharing, sharing=sharing)
    assert plan.groups == 16 // sharing and plan.micro_batch_size == 1, "a rank's part is 4,096 tokens"
    assert plan.groups * plan.micro_batch_size * plan.accumulation == 64


def test_workers_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(
        JobError, match=r"scale.workers \(6\) must be a multiple of train.sequence_parallel \(4\).* 4, 8"
    ):
        plan_batches(12, "auto", 6, 128, sharing=4)
    with pytest.raises(JobError, match=r"divisible by the 5 groups of 2 workers that share .* \[2, 4, 6, 8, 12, 24\]"):
        plan_batches(12, "auto", 10, 128, sharing=2)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_rates_equal_transformers_one_step_ahead_in_the_warm_up(kind: str) -> None:
    """transformers starts the warm-up at 0, a wasted step; ours starts one step further up."""
    import torch
    from transformers import get_scheduler

    steps, warmup = 40, 4
    names = {"constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(names.get(kind, kind), optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    schedule = Schedule(kind, 1.0, steps, warmup / steps)  # type: ignore[arg-type]
    ours = [schedule.rate(step) for step in range(steps)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert Schedule("cosine", 2e-5, 10, 0.0).rate(0) == 2e-5
    assert math.isclose(Schedule("cosine", 2e-5, 1, 0.5).rate(0), 2e-5)
