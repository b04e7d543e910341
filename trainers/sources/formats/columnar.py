"""parquet and arrow: rows numbered from 0, units of whole row groups or record batches, other columns never read.

An .arrow file may be of the file kind (as Feather 2 is) or of the stream kind (as `datasets` caches are); in a stream
a unit's record batches are found by stepping over those before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainers.sources.class_names import Decode, class_names, decoders, feature_of, read_features
from trainers.sources.files import SourceFile
from trainers.sources.formats.base import SLICE_BYTES, SLICE_ROWS, RawRow, Span, open_whole
from trainers.sources.formats.sniff import unreadable

READ_ERRORS = (OSError, pa.ArrowException)


class Parquet:
    """Parquet files."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        try:
            with pq.ParquetFile(open_whole(source)) as file:
                return tuple(file.schema_arrow.names)
        except READ_ERRORS as error:
            raise unreadable(source, "a Parquet file", error) from error

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        """Row groups, together until they reach `unit_bytes` before compression."""
        with pq.ParquetFile(open_whole(source)) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            return _group([(group.num_rows, group.total_byte_size) for group in groups], unit_bytes)

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        with pq.ParquetFile(open_whole(source)) as file:
            wanted = [name for name in columns if name in file.schema_arrow.names]
            stop = file.metadata.num_row_groups if span.stop is None else span.stop
            decode = decoders(read_features(file.schema_arrow), wanted)
            first = span.first_row
            for group in range(span.start, stop):
                held = file.metadata.row_group(group)
                size = _slice_rows(held.num_rows, held.total_byte_size)
                for batch in file.iter_batches(size, row_groups=[group], columns=wanted):
                    yield from _rows(batch, first, decode)
                    first += batch.num_rows


class ArrowIpc:
    """Arrow IPC files of both kinds."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        try:
            with _open_ipc(source) as reader:
                return tuple(reader.schema.names)
        except READ_ERRORS as error:
            raise unreadable(source, "an Arrow IPC file", error) from error

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        """Record batches, taken as equally large."""
        with _open_ipc(source) as reader:
            rows = [batch.num_rows for batch in _batches(reader, Span())]  # memory-mapped: no column is read
            return _group([(one, source.size // len(rows)) for one in rows], unit_bytes)

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        with _open_ipc(source) as reader:
            decode = decoders(read_features(reader.schema), columns)
            first = span.first_row
            for whole in _batches(reader, span):
                batch = whole.select([name for name in columns if name in whole.schema.names])
                size = _slice_rows(batch.num_rows, batch.nbytes)
                for start in range(0, batch.num_rows, size):
                    yield from _rows(batch.slice(start, size), first + start, decode)
                first += batch.num_rows


def _open_ipc(source: SourceFile) -> Any:
    stream = open_whole(source)
    magic = stream.read(6)
    stream.seek(0)
    return pa.ipc.open_file(stream) if magic == b"ARROW1" else pa.ipc.open_stream(stream)


def _batches(reader: Any, span: Span) -> Iterator[pa.RecordBatch]:
    if not isinstance(reader, pa.RecordBatchFileReader):
        return islice(reader, span.start, span.stop)
    stop = reader.num_record_batches if span.stop is None else span.stop
    return (reader.get_batch(index) for index in range(span.start, stop))


def _group(parts: Sequence[tuple[int, int]], unit_bytes: int) -> list[Span]:
    """Neighbouring parts, given as (rows, bytes), joined until a unit reaches its size."""
    spans: list[Span] = []
    start = first = rows = size = 0
    for index, (part_rows, part_bytes) in enumerate(parts):
        rows, size = rows + part_rows, size + part_bytes
        if size >= unit_bytes or index == len(parts) - 1:
            spans.append(Span(start, index + 1, first))
            start, first, rows, size = index + 1, first + rows, 0, 0
    return spans


def _slice_rows(rows: int, size: int) -> int:
    return max(1, min(SLICE_ROWS, SLICE_BYTES * rows // max(size, 1)))


def _rows(batch: pa.RecordBatch, first: int, decode: Mapping[str, Decode]) -> Iterator[RawRow]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:  # one bad string spoils the batch: find its row
        rows = [_row(batch, index) for index in range(batch.num_rows)]
    for row, fields in enumerate(rows, first):
        if decode and fields is not None:
            fields |= {name: decode[name](fields[name]) for name in decode if name in fields}
        yield row, fields


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
    return row


def declared_classes(source: SourceFile, column: str) -> tuple[str, ...]:
    """The names of the classes in a column of a columnar file, in order; empty if it declares none."""
    if source.format == "parquet":
        with pq.ParquetFile(open_whole(source)) as file:
            return class_names(feature_of(read_features(file.schema_arrow), column))
    if source.format == "arrow":
        with _open_ipc(source) as reader:
            return class_names(feature_of(read_features(reader.schema), column))
    return ()
