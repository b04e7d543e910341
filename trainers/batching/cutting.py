"""How the sequences of a step become micro-batches: from their lengths alone, so every rank finds the same.

A micro-batch is padded to its longest sequence, and a step waits in each round for the rank with the most positions. So
sequences go by length, the longest first, into micro-batches of about equally many positions: few of the long ones,
many of the short ones, and no more positions than in `micro_batch_size` of the run's longest. More rounds pad less, but
each also costs what a micro-batch of any size does: launches, gathered weights.
"""

from collections.abc import Iterator
from math import ceil, inf

from trainers.batching.batch_plan import BatchPlan
from trainers.records import Array

FINER = 64
"""A micro-batch's positions are settled to this share of them."""

LAUNCH = {"card": {"plain": 1.2e12, "hooks": 7e12}, "cpu": {"plain": 2.5e8, "hooks": 2.5e8}}
"""Parameters times positions in the time in which a micro-batch's kernels are launched, also with the hooks of stage 3.
From steps of a Llama of 135 million parameters on one H100: 32,768 positions took 0.223 s in one micro-batch and 0.41 s
in four; a loop by hand under stage 3 took 1.58 s for four."""
GATHER = {"card": {"none": 3e3, "cpu": 1e4, "nvme": 5e4}, "cpu": {"none": 500.0, "cpu": 500.0, "nvme": 500.0}}
"""Positions in the time in which stage 3 gathers weights, by where it keeps them. On a card: 6 operations a position
and weight, at 300 trillion a second, beside the weight's bytes at 100, 30 and 6 GB a second. On CPUs: steps of the
quickstart took 0.51 s for each micro-batch and 0.89 ms for each position."""


def overhead_positions(parameters: int, on_card: bool, gathered_from: str | None) -> float:
    """About what a micro-batch costs beside its positions, in positions of the model.

    Args:
        gathered_from: where stage 3 keeps the weights, as DeepSpeed calls it; None under other stages.
    """
    device, kind = "card" if on_card else "cpu", "hooks" if gathered_from else "plain"
    gather = GATHER[device][gathered_from] if gathered_from else 0.0
    return LAUNCH[device][kind] / max(parameters, 1) + gather


def cut_step(lengths: Array, plan: BatchPlan, longest: int, overhead: float) -> list[slice]:
    """The micro-batches of a step, round by round, within a round rank by rank: slices of `lengths`, which hold each of
    them once. The last may be empty.

    Args:
        lengths: of the step's sequences, falling.
        longest: of any sequence of the run: `plan.micro_batch_size` of them fill a micro-batch.
        overhead: what a micro-batch costs beside its positions, in positions.
    """
    of_each = [int(each) for each in lengths]
    cuts = _by_rows(len(of_each), plan)
    least = _cost(cuts, of_each, plan.groups, overhead)
    room, share = plan.micro_batch_size * longest, sum(of_each) / plan.groups
    for rounds in _numbers(plan.rounds):
        if rounds * overhead + share >= least:
            break
        found = _by_positions(of_each, rounds * plan.groups, room)
        if found and (cost := _cost(found, of_each, plan.groups, overhead)) < least:
            cuts, least = found, cost
    missing = -len(cuts) % plan.groups
    return [*cuts, *[slice(len(of_each), len(of_each))] * missing]


def _numbers(most: int) -> Iterator[int]:
    """Numbers of rounds that are tried: all small ones, of the large ones some, and the largest."""
    number = 1
    while number < most:
        yield number
        number += max(number // 4, 1)
    yield most


def _by_rows(count: int, plan: BatchPlan) -> list[slice]:
    size = plan.micro_batch_size
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _by_positions(lengths: list[int], most: int, room: int) -> list[slice] | None:
    """At most `most` micro-batches of as few positions as will do; None where they need more than `room`."""
    enough = _filled(lengths, room, most)
    low, high = max(lengths[0], ceil(sum(lengths) / most)), room
    while enough and high - low > low // FINER:
        middle = (low + high) // 2
        found = _filled(lengths, middle, most)
        if found:
            enough, high = found, middle
        else:
            low = middle + 1
    return enough


def _filled(lengths: list[int], positions: int, most: int) -> list[slice] | None:
    """Each micro-batch takes as many sequences as its first leaves room for."""
    cuts: list[slice] = []
    start, count = 0, len(lengths)
    while start < count:
        if len(cuts) == most:
            return None
        end = min(start + max(positions // lengths[start], 1), count)
        cuts.append(slice(start, end))
        start = end
    return cuts


def _cost(cuts: list[slice], lengths: list[int], ranks: int, overhead: float) -> float:
    """Positions of the fullest micro-batch of each round, summed, and what the rounds cost beside them."""
    padded = [(cut.stop - cut.start) * lengths[cut.start] for cut in cuts]
    rounds = [padded[first : first + ranks] for first in range(0, len(padded), ranks)]
    return sum(overhead + max(each) for each in rounds) if rounds else inf
