"""What a file format must provide, and the records that pass between a format and the readers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from trainers.errors import DataError
from trainers.sources.files import SourceFile
from trainers.storage import filesystem_of

BUFFER_BYTES = 2**20
PEEK_ROWS = 100
"""Rows that are looked at before anything runs."""
SLICE_ROWS = 1000
SLICE_BYTES = 4 * 2**20
"""Columnar files become Python rows in slices no larger than these two."""

RawRow = tuple[int, dict[str, Any] | None]
"""A row's identity within its file, and its columns; None where it is malformed."""


@dataclass(frozen=True)
class Span:
    """A part of a file that one unit reads; what the numbers count is the format's own affair."""

    start: int = 0
    stop: int | None = None
    """None: to the end."""
    first_row: int = 0
    """Row number of the first row, where the format numbers rows."""


class Format(Protocol):
    """How files of one format are read. Implementations hold no state."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        """Columns that the file has, or that its first rows show; None where there are no rows to tell.

        Raises:
            DataError: where the file is not of this format.
        """

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        """Spans that together hold each row once; a function of the file and `unit_bytes` alone."""

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """The rows of a span in order, with at least those of the named columns that are there."""


def open_stream(source: SourceFile) -> io.BufferedReader:
    """The decompressed bytes, buffered; seekable where the file is not compressed."""
    fs, path = filesystem_of(source.uri)
    if source.compression:
        return io.BufferedReader(fs.open_input_stream(path, compression=source.compression), BUFFER_BYTES)
    return io.BufferedReader(fs.open_input_file(path), BUFFER_BYTES)


def open_whole(source: SourceFile) -> pa.NativeFile:
    """The file for random access, memory-mapped where it is local."""
    fs, path = filesystem_of(source.uri)
    return pa.memory_map(path) if fs.type_name == "local" else fs.open_input_file(path)


def not_as_named(source: SourceFile, expected: str, found: str, remedy: str) -> DataError:
    """The error for a file that is not what its name, or `data.format`, says."""
    return DataError(f"{source.uri}: expected {expected}, found {found}. {remedy}")


def has_lone_surrogate(text: str) -> bool:
    """Whether a string holds half of a UTF-16 pair, which no tokenizer and no UTF-8 file can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
