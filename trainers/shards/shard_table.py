"""The records of a split's shards, as columns: a million of them are opened in milliseconds and take no Python object
each. Begin at `ShardTable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa

from trainers.records import Array, Record

COUNTS = pa.map_(pa.string(), pa.int64())
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("ledger", pa.string()),
        ("source", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("targets", pa.int64()),
        ("bytes", pa.int64()),
        ("digest", pa.string()),
        ("outcomes", COUNTS),
        ("tokens_lost", pa.int64()),
        ("labels", COUNTS),
    ]
)
SLICE = 4096


class ShardRecord(Record):
    """One committed shard: `file` holds the sequences, `ledger` one line per input row."""

    file: str
    ledger: str
    source: int
    """The file it was read from, as an index into the manifest's sources."""
    rows: int
    """Sequences in `file` (a split input row gives several)."""
    tokens: int
    targets: int
    """Tokens, or rows, that the loss is taken over."""
    bytes: int
    digest: str
    """xxh3-128 of `file`."""
    outcomes: dict[str, int]
    """Input rows by outcome: kept, truncated, split, dropped:REASON, or removed:REASON where the job asked for that."""
    tokens_lost: int
    """Tokens cut off from truncated rows."""
    labels: dict[str, int] = {}
    """Rows by label, where the task has one."""


class ShardTable(Sequence[ShardRecord]):
    """Records of shards, in the order of the shards; each is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @staticmethod
    def of(records: Iterable[ShardRecord]) -> ShardTable:
        """From records."""
        lines = [
            one.model_dump() | {"outcomes": [*one.outcomes.items()], "labels": [*one.labels.items()]} for one in records
        ]
        return ShardTable(pa.Table.from_pylist(lines, SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, place: slice) -> ShardTable: ...
    def __getitem__(self, place: int | slice) -> ShardRecord | ShardTable:
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            return ShardTable(self.table.slice(start, max(stop - start, 0)))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return next(iter(ShardTable(self.table.slice(place % len(self), 1))))

    def __iter__(self) -> Iterator[ShardRecord]:
        for start in range(0, len(self), SLICE):
            for line in self.table.slice(start, SLICE).to_pylist():
                counts = {name: dict(line[name]) for name in ("outcomes", "labels")}
                yield ShardRecord.model_construct(**{**line, **counts})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and bool(self.table.equals(other.table))

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, name: str) -> Array:
        """One numeric column, int64 [shards]."""
        column: Array = self.table[name].to_numpy()
        return column

    @cached_property
    def outcomes(self) -> dict[str, int]:
        """Input rows by outcome, over all shards."""
        return self._summed("outcomes")

    @cached_property
    def labels(self) -> dict[str, int]:
        """Rows by label, over all shards."""
        return self._summed("labels")

    def _summed(self, name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for chunk in self.table[name].chunks:
            names = chunk.keys.dictionary_encode()
            sums = np.zeros(len(names.dictionary), np.int64)
            np.add.at(sums, names.indices.to_numpy(), chunk.items.to_numpy())
            for label, count in zip(names.dictionary.to_pylist(), sums.tolist(), strict=True):
                total[label] = total.get(label, 0) + count
        return dict(sorted(total.items()))


def as_table(value: Any) -> ShardTable:
    """A table from itself, from records, or from records as JSON gives them. Raises ValueError, as pydantic wants."""
    if isinstance(value, ShardTable):
        return value
    return ShardTable.of(one if isinstance(one, ShardRecord) else ShardRecord.model_validate(one) for one in value)


def as_records(table: ShardTable) -> list[dict[str, Any]]:
    """The records as JSON has them."""
    return [one.model_dump() for one in table]
