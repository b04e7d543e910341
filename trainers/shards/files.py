"""The files of a shard, the two Arrow ones written batch by batch so that memory stays flat.

shard-*.arrow, uncompressed so that it can be memory-mapped: input_ids list<int32>, file int32, row int64, part int32
    (place among the sequences of a split row), then what the task cannot derive.
ledger-*.arrow: file int32, row int64, outcome, tokens int32 (in all its sequences), tokens_lost int32, text uint64
    (digest of what the row says, see `text_digest`; 0 where it is malformed).
counts-*.npy: length and targets of each sequence.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from trainers.records import Array
from trainers.tasks import Task
from trainers.tokenizer.token_arrays import EncodedBatch

BATCH_TOKENS = 2**18
BATCH_ROWS = 2**14
"""A record batch is closed at either; only a single sequence longer than that makes a larger one."""
ORIGIN = (("file", pa.int32()), ("row", pa.int64()), ("part", pa.int32()))
LEDGER_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("outcome", pa.dictionary(pa.int32(), pa.string())),
        ("tokens", pa.int32()),
        ("tokens_lost", pa.int32()),
        ("text", pa.uint64()),
    ]
)

COUNTS = np.dtype([("length", "<i4"), ("targets", "<i4")])


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def ledger_name(number: int) -> str:
    return f"ledger-{number:05d}.arrow"


def counts_name(number: int) -> str:
    """The file of the lengths and targets of a unit's sequences."""
    return f"counts-{number:05d}.npy"


def record_name(number: int) -> str:
    """The file that commits a unit."""
    return f"shard-{number:05d}.json"


def shard_schema(task: Task) -> pa.Schema:
    return pa.schema([("input_ids", pa.list_(pa.int32())), *ORIGIN, *task.extra_schema])


class SequenceFile:
    """A shard file being written. `close` ends it; the counts are right from then on."""

    def __init__(self, stream: pa.NativeFile, task: Task, file: int) -> None:
        self.labels: dict[str, int] = {}
        self.counts = np.zeros(0, COUNTS)
        self._counts: list[Array] = []
        self._task, self._file = task, file
        self._schema = shard_schema(task)
        self._sink = _DigestingSink(stream)
        self._writer = pa.ipc.new_file(self._sink, self._schema)

    @property
    def bytes(self) -> int:
        return self._sink.bytes

    @property
    def digest(self) -> str:
        """xxh3-128 of what was written."""
        return str(self._sink.hasher.hexdigest())

    def add(self, rows: Array, encoded: EncodedBatch) -> None:
        """Append the sequences of some input rows, whose identities are `rows`, int64 [rows]."""
        start = 0
        while start < len(encoded.tokens):
            stop = _batch_end(encoded.tokens.offsets, start)
            self._write(rows, encoded, start, stop)
            start = stop

    def close(self) -> None:
        self._writer.close()
        self.counts = np.concatenate([self.counts, *self._counts])
        self.labels = dict(sorted(self.labels.items()))

    def _write(self, rows: Array, encoded: EncodedBatch, start: int, stop: int) -> None:
        offsets = encoded.tokens.offsets[start : stop + 1]
        ids = encoded.tokens.ids[offsets[0] : offsets[-1]]
        columns: list[Any] = [
            pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), pa.array(ids)),
            pa.array(np.full(stop - start, self._file, dtype=np.int32)),
            pa.array(rows[encoded.row[start:stop]]),
            pa.array(encoded.part[start:stop]),
            *(encoded.extra[name].slice(start, stop - start) for name, _ in self._task.extra_schema),
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        self._writer.write_batch(batch)
        counts = np.empty(batch.num_rows, COUNTS)
        counts["length"] = np.diff(offsets)
        counts["targets"] = self._task.count_targets(pa.Table.from_batches([batch]))
        self._counts.append(counts)
        if self._task.has_labels:
            for label, count in self._task.count_labels(batch).items():
                self.labels[label] = self.labels.get(label, 0) + count


def _batch_end(offsets: Array, start: int) -> int:
    """Where a record batch that begins at sequence `start` ends: past the sequence that reaches either limit."""
    full = int(np.searchsorted(offsets, offsets[start] + BATCH_TOKENS, side="left"))
    return min(max(full, start + 1), start + BATCH_ROWS, len(offsets) - 1)


class LedgerFile:
    """A ledger file being written: what became of each input row."""

    def __init__(self, stream: pa.NativeFile, file: int) -> None:
        self.tokens_lost = 0
        self._file = file
        # The outcomes of a unit are not known ahead: later batches append new names to the dictionary.
        self._writer = pa.ipc.new_file(
            stream, LEDGER_SCHEMA, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
        )
        self._counts: dict[str, int] = {}
        self._codes: dict[str, int] = {}

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    def add(self, rows: Array, encoded: EncodedBatch, texts: Array) -> None:
        """Note the outcomes of some input rows; `texts` holds the digest of what each says, uint64 [rows]."""
        if not len(rows):
            return
        counts = np.bincount(encoded.codes, minlength=len(encoded.outcomes)).tolist()
        shown = [(code, name) for code, name in enumerate(encoded.outcomes) if counts[code]]
        recode = np.zeros(len(encoded.outcomes), dtype=np.int32)
        for code, name in shown:
            recode[code] = self._codes.setdefault(name, len(self._codes))
            self._counts[name] = self._counts.get(name, 0) + counts[code]
        self.tokens_lost += int(encoded.tokens_lost.sum())
        names = pa.array(list(self._codes), pa.string())
        columns = [
            pa.array(np.full(len(rows), self._file, dtype=np.int32)),
            pa.array(rows),
            pa.DictionaryArray.from_arrays(pa.array(recode[encoded.codes]), names),
            pa.array(encoded.tokens_of_rows()),
            pa.array(encoded.tokens_lost),
            pa.array(texts),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=LEDGER_SCHEMA))

    def close(self) -> None:
        self._writer.close()


class _DigestingSink:
    """A file object that digests what passes through it, so that nothing is read back."""

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self.hasher = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.hasher.update(view)
        self._stream.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The stream below belongs to another."""
