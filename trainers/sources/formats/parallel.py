"""parallel: two text files, a source a line in one and its target on the same line of the other.

Rows are lines, numbered from 0; each file may be compressed by itself. A line that is not UTF-8 makes a malformed row;
files of unequal length are refused, as from some line on they do not belong together. Read whole, streamed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

from trainers.errors import DataError
from trainers.job.schema import PAIR
from trainers.sources.files import SourceFile, compression_of
from trainers.sources.formats.base import RawRow, Span, not_as_named, open_stream
from trainers.sources.formats.sniff import read_text_head

FIELDS = ("source", "target")
BOM = "\ufeff"


class Parallel:
    """Two files, line by line."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        for side in _sides(source):
            read_text_head(side, "text in UTF-8")
        return FIELDS if source.size else None

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        return [Span()] if source.size else []

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Lines in order. Raises DataError where one file ends before the other."""
        first, second = (_lines(side) for side in _sides(source))
        for row, texts in enumerate(zip_longest(first, second, fillvalue=b"")):
            if b"" in texts:
                short = source.uri.split(PAIR)[texts.index(b"")]
                raise DataError(
                    f"{source.uri}: {short} ends after {row:,} lines and the other file goes on. Lines of parallel "
                    "texts belong together: give files of equal length"
                )
            try:
                yield row, {name: _text(line) for name, line in zip(FIELDS, texts, strict=True)}
            except UnicodeDecodeError:
                yield row, None


def _sides(source: SourceFile) -> list[SourceFile]:
    uris = source.uri.split(PAIR)
    if len(uris) != len(FIELDS):
        raise not_as_named(source, "two files", "one", "Name them in the job: {source: FILE, target: FILE}")
    return [replace(source, uri=uri, format="text", compression=compression_of(uri)) for uri in uris]


def _lines(side: SourceFile) -> Iterator[bytes]:
    with open_stream(side) as stream:
        yield from stream


def _text(line: bytes) -> str:
    return line.decode().removeprefix(BOM).rstrip("\r\n")
