"""How a step's sequences become micro-batches: each once, none too full, and never dearer than by rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.batching.batch_plan import BatchPlan, plan_batches
from trainers.batching.cutting import cut_step, overhead_positions


def padded(cuts: list[slice], lengths: list[int]) -> list[int]:
    """Positions of each micro-batch."""
    return [(cut.stop - cut.start) * lengths[cut.start] if cut.stop > cut.start else 0 for cut in cuts]


def cost(cuts: list[slice], lengths: list[int], ranks: int, overhead: float) -> float:
    each = padded(cuts, lengths)
    return sum(overhead + max(each[first : first + ranks]) for first in range(0, len(each), ranks))


@settings(max_examples=500, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=64),
    ranks=st.integers(1, 4),
    micro=st.integers(1, 8),
    spread=st.booleans(),
    overhead=st.sampled_from([0.0, 50.0, 5000.0]),
    longer=st.integers(0, 100),
)
def test_each_sequence_once_within_the_room_and_never_dearer_than_by_rows(
    lengths: list[int], ranks: int, micro: int, spread: bool, overhead: float, longer: int
) -> None:
    lengths = sorted(lengths, reverse=True)
    rounds = -(-len(lengths) // (ranks * micro))
    plan = BatchPlan(ranks * micro * rounds, ranks, micro, rounds, spread)
    longest = lengths[0] + longer
    cuts = cut_step(np.array(lengths), plan, longest, overhead)
    assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(len(lengths)))
    assert len(cuts) % ranks == 0 and ranks <= len(cuts) <= ranks * plan.rounds
    assert max(padded(cuts, lengths)) <= micro * longest
    by_rows = [slice(first, min(first + micro, len(lengths))) for first in range(0, len(lengths), micro)]
    assert cost(cuts, lengths, ranks, overhead) <= cost(by_rows, lengths, ranks, overhead)


def test_sequences_of_one_length_are_cut_by_rows() -> None:
    plan = plan_batches(32, 4, 2, 128, spread=True)
    assert [cut.stop - cut.start for cut in cut_step(np.full(32, 128), plan, 128, 100.0)] == [4] * 8


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    plan = plan_batches(32, 32, 1, 512, spread=True)
    lengths = np.array([512, *[20] * 31])
    assert cut_step(lengths, plan, 512, 100.0) == [slice(0, 1), slice(1, 32)]
    assert cut_step(lengths, plan_batches(32, 32, 1, 512), 512, 100.0) == [slice(0, 32)]  # where it may not take two
    assert cut_step(lengths, plan, 512, 20_000.0) == [slice(0, 32)]  # where one more costs more than the padding


def test_short_sequences_fill_fewer_micro_batches() -> None:
    """64 sequences of 10 where micro-batches of 2 may hold 2 x 100 positions: 20 at once, on two ranks in 2 rounds."""
    plan = plan_batches(64, 2, 2, 100)
    cuts = cut_step(np.full(64, 10), plan, 100, 50.0)
    assert plan.accumulation == 16 and len(cuts) == 4 and max(padded(cuts, [10] * 64)) <= 200


def test_ranks_get_about_equally_many_positions() -> None:
    lengths = np.sort(np.random.default_rng(0).lognormal(4, 0.7, 256).astype(int))[::-1]
    cuts = cut_step(lengths, plan_batches(256, 32, 8, 512), 512, 1000.0)
    each = padded(cuts, lengths.tolist())
    assert len(cuts) == 8 and max(each) < 1.25 * sum(each) / 8 and max(each) < 32 * lengths[0] / 2


@pytest.mark.parametrize(("per_rank", "micro", "rounds"), [(16, 16, 4), (6, 6, 6), (1, 1, 1), (2, 2, 2), (64, 4, 16)])
def test_how_many_micro_batches_a_step_may_take(per_rank: int, micro: int, rounds: int) -> None:
    plan = plan_batches(2 * per_rank, micro, 2, 128, spread=True)
    assert plan.rounds == rounds and plan.per_rank % plan.rounds == 0
    assert plan_batches(2 * per_rank, micro, 2, 128).rounds == per_rank // micro


def test_a_micro_batch_costs_more_positions_of_a_small_model_and_where_weights_are_gathered() -> None:
    small, large = (overhead_positions(parameters, True, None) for parameters in (10**8, 10**10))
    assert small > 10 * large
    assert overhead_positions(10**10, True, "nvme") > overhead_positions(10**10, True, "none") > large
    assert overhead_positions(10**8, False, None) < small
