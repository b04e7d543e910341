"""The two Arrow files of a shard, written record batch by record batch so that memory stays flat.

shard-*.arrow, uncompressed so that it can be memory-mapped: input_ids list<int32>, file int32, row int64, part int32
    (place among the sequences of a split row), then what the task cannot derive.
ledger-*.arrow: file int32, row int64, outcome, tokens int32 (in all its sequences), tokens_lost int32.
"""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from trainers.tasks import Encoded, Sequence, Task

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
    ]
)


def shard_schema(task: Task) -> pa.Schema:
    """Columns of a shard file of this task."""
    return pa.schema([("input_ids", pa.list_(pa.int32())), *ORIGIN, *task.extra_schema])


class SequenceFile:
    """A shard file being written. `close` ends it; the counts are right from then on."""

    def __init__(self, stream: pa.NativeFile, task: Task, file: int) -> None:
        self.rows = self.tokens = self.targets = 0
        self.labels: dict[str, int] = {}
        self._task, self._file = task, file
        self._schema = shard_schema(task)
        self._sink = _DigestingSink(stream)
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._pending: list[tuple[int, int, Sequence]] = []
        self._pending_tokens = 0

    @property
    def bytes(self) -> int:
        """Bytes written."""
        return self._sink.bytes

    @property
    def digest(self) -> str:
        """xxh3-128 of what was written."""
        return str(self._sink.hasher.hexdigest())

    def add(self, row: int, encoded: Encoded) -> None:
        """Append the sequences of one input row."""
        for part, sequence in enumerate(encoded.sequences):
            self._pending.append((row, part, sequence))
            self._pending_tokens += len(sequence.input_ids)
            if self._pending_tokens >= BATCH_TOKENS or len(self._pending) >= BATCH_ROWS:
                self._flush()

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()
        self.labels = dict(sorted(self.labels.items()))

    def _flush(self) -> None:
        if not self._pending:
            return
        batch = self._batch()
        self._writer.write_batch(batch)
        self.rows += batch.num_rows
        self.tokens += self._pending_tokens
        self.targets += int(self._task.count_targets(pa.Table.from_batches([batch])).sum())
        shown = Counter(label for _, _, one in self._pending for label in self._task.labels_of(one.extra))
        for label, count in shown.items():
            self.labels[label] = self.labels.get(label, 0) + count
        self._pending, self._pending_tokens = [], 0

    def _batch(self) -> pa.RecordBatch:
        rows, parts, sequences = zip(*self._pending, strict=True)
        ids = [np.asarray(one.input_ids, dtype=np.int32) for one in sequences]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        columns: list[Any] = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids))),
            pa.array(np.full(len(rows), self._file, dtype=np.int32)),
            pa.array(rows, pa.int64()),
            pa.array(parts, pa.int32()),
            *(pa.array([one.extra[name] for one in sequences], kind) for name, kind in self._task.extra_schema),
        ]
        return pa.record_batch(columns, schema=self._schema)


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
        self._pending: list[tuple[int, int, int, int]] = []

    @property
    def outcomes(self) -> dict[str, int]:
        """Input rows by outcome."""
        return dict(sorted(self._counts.items()))

    def add(self, row: int, encoded: Encoded) -> None:
        """Note the outcome of one input row."""
        code = self._codes.setdefault(encoded.outcome, len(self._codes))
        self._counts[encoded.outcome] = self._counts.get(encoded.outcome, 0) + 1
        self.tokens_lost += encoded.tokens_lost
        tokens = sum(len(sequence.input_ids) for sequence in encoded.sequences)
        self._pending.append((row, code, tokens, encoded.tokens_lost))
        if len(self._pending) >= BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        rows, codes, tokens, lost = zip(*self._pending, strict=True)
        outcome = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(self._codes), pa.string()))
        columns = [
            pa.array(np.full(len(rows), self._file, dtype=np.int32)),
            pa.array(rows, pa.int64()),
            outcome,
            pa.array(tokens, pa.int32()),
            pa.array(lost, pa.int32()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=LEDGER_SCHEMA))
        self._pending = []


class _DigestingSink:
    """A file object that digests what passes through it, so that nothing is read back."""

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self.hasher = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: Any) -> int:
        """Pass data on."""
        view = memoryview(data)
        self.hasher.update(view)
        self._stream.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The stream below belongs to another."""
