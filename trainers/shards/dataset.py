"""Reading shards back: any sequence of a split by its place, and the lengths of all of them without reading a token.

Files are memory-mapped, from a local copy where storage is remote, and opened when first needed; only so many stay
open. Knows nothing of order or packing. Begin at `ShardSet`.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainers.errors import DataError
from trainers.records import Array
from trainers.shards.files import COUNTS, ORIGIN, counts_name, shard_schema
from trainers.shards.manifest import ShardManifest, ShardRecord
from trainers.storage import Folder, load_array, save_array
from trainers.tasks import Example, Task
from trainers.tokenizer.token_arrays import starts_of

ALL_COUNTS = "counts.npy"
OPEN_SHARDS = 256
"""Files kept open at once: a quarter of the usual limit of 1,024 descriptors a process."""


class ShardSet:
    """One committed split, read-only. Cheap to make: no file is opened before it is needed."""

    def __init__(self, folder: Folder, manifest: ShardManifest, task: Task) -> None:
        self.folder = folder
        self.manifest = manifest
        self._task = task
        self._starts = starts_of(manifest.numbers("rows"))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each sequence, int32 [rows]."""
        return np.ascontiguousarray(self._counts["length"])

    @cached_property
    def targets(self) -> Array:
        """Targets of each sequence, int64 [rows]: what the loss is averaged over."""
        return self._counts["targets"].astype(np.int64)

    @cached_property
    def _counts(self) -> Array:
        """Lengths and targets: those of all shards in one file, which the first reader puts together."""
        with suppress(FileNotFoundError, ValueError):
            counts = load_array(self.folder, ALL_COUNTS)
            if len(counts) == len(self):
                return counts
        numbers = range(len(self.manifest.shards))
        try:
            counts = np.concatenate([np.zeros(0, COUNTS), *(load_array(self.folder, counts_name(n)) for n in numbers)])
            if len(counts) != len(self):
                raise ValueError(f"lengths of {len(counts)} sequences, not {len(self)} as committed")
        except (OSError, ValueError) as error:
            raise _damaged(self.folder, "counts-*.npy", str(error)) from error
        save_array(self.folder, ALL_COUNTS, counts)
        return counts

    def row(self, index: int) -> Example:
        """The sequence at a place of the split; its ids are a view of the mapped file. Raises IndexError."""
        shard, place = self._find(index)
        batch, inner = shard.locate(place)
        extra = {name: batch.batch.column(name)[inner].as_py() for name, _ in self._task.extra_schema}
        return Example(index, batch.ids[batch.offsets[inner] : batch.offsets[inner + 1]], extra)

    def origin(self, index: int) -> tuple[str, int, int]:
        """(file, row, part) that a sequence came from: the row as the ledger names it. Raises IndexError."""
        shard, place = self._find(index)
        batch, inner = shard.locate(place)
        file, row, part = (batch.batch.column(name)[inner].as_py() for name, _ in ORIGIN)
        return self.manifest.sources[file], row, part

    def places(self, file: str, row: int) -> list[int]:
        """The places of the sequences that an input row became."""
        found: list[int] = []
        for number, record in enumerate(self.manifest.shards):
            if self.manifest.sources[record.source] == file:
                found += (self._starts[number] + self._shard(number).of_row(row)).tolist()
        return found

    def _find(self, index: int) -> tuple[_OpenShard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shard(number), index - int(self._starts[number])

    def _shard(self, number: int) -> _OpenShard:
        """An open shard; the one used longest ago makes room. Views handed out keep their own mapping alive."""
        shard = self._open.pop(number, None) or _OpenShard(self.folder, self.manifest.shards[number], self._task)
        self._open[number] = shard
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


class _Batch:
    """A record batch with its ids and their offsets as numpy sees them."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        column = batch.column("input_ids")
        self.batch = batch
        self.offsets: Array = column.offsets.to_numpy()
        self.ids: Array = column.values.to_numpy()


class _OpenShard:
    """One shard file, opened."""

    def __init__(self, folder: Folder, record: ShardRecord, task: Task) -> None:
        try:
            reader = pa.ipc.open_file(_nearby(folder, record).open_input(record.file))
            self.batches = [_Batch(reader.get_batch(index)) for index in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise _damaged(folder, record.file, str(error)) from error
        rows = [batch.batch.num_rows for batch in self.batches]
        if reader.schema != shard_schema(task) or sum(rows) != record.rows:
            problem = f"{sum(rows)} rows of {reader.schema.names}, not {record.rows} as committed"
            raise _damaged(folder, record.file, problem)
        self._starts = np.cumsum([0, *rows])

    def of_row(self, row: int) -> Array:
        """Places in this shard of an input row's sequences, int64."""
        rows = [batch.batch.column("row").to_numpy() for batch in self.batches]
        return np.flatnonzero(np.concatenate([np.zeros(0, np.int64), *rows]) == row)

    def locate(self, place: int) -> tuple[_Batch, int]:
        """The record batch that holds a row of this shard, and the row's place in it."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.batches[number], place - int(self._starts[number])


def _nearby(folder: Folder, record: ShardRecord) -> Folder:
    """Where a shard can be memory-mapped: remote ones are copied whole to this machine, once for all its processes."""
    if folder.is_local:
        return folder
    near = Folder(str(Path(tempfile.gettempdir()) / f"tuneyard-{os.getuid()}" / "shards" / folder.name))
    if not near.exists(record.file) or near.size(record.file) != record.bytes:
        near.write_bytes(record.file, folder.read_bytes(record.file))
    return near


def _damaged(folder: Folder, name: str, problem: str) -> DataError:
    return DataError(f"{folder / name} is missing or damaged ({problem}). Remove {folder} to shard again")
