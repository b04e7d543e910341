"""The order of training: each sequence exactly once an epoch, any step reachable at once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.batching.order import plan_order, shuffled


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 50))
def test_shuffling_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_shuffling_looks_random() -> None:
    """Neighbours end up anywhere: mean displacement of a random permutation is a third of its size."""
    size = 10_000
    images = shuffled(np.arange(size), size, 0, 0)
    assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.01
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [shuffled(np.arange(100), 100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from([1.0, 2.0, 2.5, 3.0]))
def test_whole_epochs_show_each_sequence_equally_often(sequences: int, batch: int, epochs: float) -> None:
    order = plan_order(sequences, batch, epochs, None, seed=7)
    seen = Counter(index for step in range(order.steps) for index in order.step(step).tolist())
    assert sum(seen.values()) == order.total
    assert set(seen.values()) <= {int(epochs), int(epochs) + 1}
    if epochs == int(epochs):
        assert set(seen.values()) == {int(epochs)}
        assert len(seen) == sequences


def test_only_the_last_step_of_the_run_is_short() -> None:
    order = plan_order(10, 4, 2.5, None, seed=0)
    assert [len(order.step(step)) for step in range(order.steps)] == [4, 4, 4, 4, 4, 4, 1]


def test_steps_override_epochs() -> None:
    order = plan_order(10, 4, None, 6, seed=0)
    assert order.steps == 6
    assert len(order.step(5)) == 4


def test_seeking_in_a_trillion_sequences_needs_no_memory() -> None:
    order = plan_order(10**12, 512, 1.0, None, seed=0)
    step = order.step(order.steps // 2)
    assert len(set(step.tolist())) == 512
    assert step.max() < 10**12


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17])
def test_smallest_sizes(size: int) -> None:
    assert sorted(shuffled(np.arange(size), size, 0, 0).tolist()) == list(range(size))
