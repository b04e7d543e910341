"""csv and tsv: a header line, then one row a record, numbered from 0. Every value is a string; an empty one is null.

csv quotes as RFC 4180 says, line breaks within quotes included. tsv has no quoting at all (IANA
text/tab-separated-values), so quotation marks in it are text. Read whole, streamed, since quotes forbid splitting.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from trainers.sources.files import SourceFile
from trainers.sources.formats.base import RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head

MAX_FIELD_CHARS = 2**28
"""Past this an unclosed quotation mark is given up, rather than reading the rest of the file into memory."""


class Delimited:
    """Both delimited formats."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        read_text_head(source, f"{source.format} in UTF-8 with a header line")
        with _open_text(source) as text:
            header = _read_header(_reader(text, source))
        if header is None:
            return None
        if any(has_lone_surrogate(name) for name in header):
            raise not_as_named(source, f"{source.format} in UTF-8", "a header that is not UTF-8", RENAME)
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            found = f"the column {twice[0]!r} twice in the header"
            raise not_as_named(source, "a header line with a name for each column", found, "Rename one of them")
        return tuple(header)

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        return [Span()] if source.size else []

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Rows as the header names them; a row with more or fewer values is malformed."""
        with _open_text(source) as text:
            reader = _reader(text, source)
            header = _read_header(reader)
            if header is not None:
                yield from enumerate(_records(reader, header))


def _open_text(source: SourceFile) -> io.TextIOWrapper:
    """Characters, with bytes that are not UTF-8 as lone surrogates, so that only their own row is lost."""
    return io.TextIOWrapper(open_stream(source), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _reader(text: io.TextIOWrapper, source: SourceFile) -> "Iterator[list[str]]":
    csv.field_size_limit(MAX_FIELD_CHARS)
    if source.format == "tsv":
        return csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(text, strict=True)


def _read_header(reader: Iterator[list[str]]) -> list[str] | None:
    return next((cells for cells in reader if cells), None)


def _records(reader: Iterator[list[str]], header: list[str]) -> Iterator[dict[str, Any] | None]:
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None
            continue
        if not cells:
            continue  # a blank line
        if len(cells) != len(header) or has_lone_surrogate("".join(cells)):
            yield None
        else:
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
