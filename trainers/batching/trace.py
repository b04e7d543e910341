"""Every token of a step and the row it came from."""

from collections.abc import Iterator

from trainers.batching.order import Order
from trainers.batching.packing import PackIndex
from trainers.records import Record
from trainers.shards.dataset import ShardSet


class TracedPiece(Record):
    """A stretch of one packed sequence, and the row it came from."""

    sequence: int
    """Place of the sequence within its step."""
    start: int
    end: int
    """Positions [start, end) of the sequence."""
    file: str
    row: int
    part: int
    """Which of its row's sequences this is, where the row was split."""


def trace_step(shards: ShardSet, packs: PackIndex, order: Order, step: int) -> Iterator[TracedPiece]:
    """Where every token of a step (counted from 1, as checkpoints are) came from."""
    for number, sequence in enumerate(order.step(step - 1).tolist()):
        start = 0
        for index in packs.pack(sequence).tolist():
            file, row, part = shards.origin(index)
            end = start + int(shards.lengths[index])
            yield TracedPiece(sequence=number, start=start, end=end, file=file, row=row, part=part)
            start = end
