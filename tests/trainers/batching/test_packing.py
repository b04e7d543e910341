"""Packing: every row once, nothing too long, nearly full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.batching.packing import one_row_each, pack_rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=300), st.integers(50, 80), st.integers(0, 3))
def test_every_row_is_in_exactly_one_pack_that_fits(lengths: list[int], capacity: int, seed: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    packs = pack_rows(array, capacity, seed)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    sums = packs.sums(array)
    assert all(0 < total <= capacity for total in sums)
    assert sums.sum() == array.sum()


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook algorithm, row by row; gives the number of packs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_needs_no_more_packs_than_the_textbook_algorithm_nearly(lengths: list[int]) -> None:
    packs = pack_rows(np.array(lengths), 40, 0)
    assert len(packs) <= best_fit_decreasing(lengths, 40) + 1


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
def test_instruction_like_lengths_fill_sequences(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 50_000).astype(int), 2, capacity)
    packs = pack_rows(lengths, capacity, 0)
    assert lengths.sum() / (len(packs) * capacity) >= 0.995


def test_seed_changes_who_shares_a_pack_but_not_how_many() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 1000)
    first, again, other = pack_rows(lengths, 100, 0), pack_rows(lengths, 100, 0), pack_rows(lengths, 100, 1)
    assert first.rows.tolist() == again.rows.tolist()
    assert first.rows.tolist() != other.rows.tolist()
    assert len(first) == len(other)


def test_a_row_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit a sequence of 100"):
        pack_rows(np.array([3, 101]), 100, 0)


def test_no_rows_give_no_packs() -> None:
    assert len(pack_rows(np.zeros(0, dtype=np.int64), 10, 0)) == 0
    assert len(one_row_each(0)) == 0
