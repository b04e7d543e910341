"""csv and tsv: a header line, then one row a record, numbered from 0. Every value is a string; an empty one is null.

csv quotes as RFC 4180 says, line breaks within quotes included; `;`, tabs or `|` in place of commas are found by the
first lines, and said. tsv has no quoting at all (IANA text/tab-separated-values), so quotation marks in it are text; a
warning says so where the first lines look quoted. A first line `sep=;`, as Excel writes it, is passed over.
Read whole, streamed, since quotes forbid splitting.
"""

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

from trainers.sources.files import SourceFile
from trainers.sources.formats.base import RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head

log = logging.getLogger(__name__)
SEPARATORS = (",", ";", "\t", "|")
GUESS_LINES = 50
EXCEL = re.compile(rb"(?:\xef\xbb\xbf)?sep=[,;|\t]\r?\n")
QUOTED = re.compile(r'"(?:[^"]|"")*"')
MAX_FIELD_CHARS = 2**28
"""Past this an unclosed quotation mark is given up, rather than reading the rest of the file into memory."""


class Delimited:
    """Both delimited formats."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        read_text_head(source, f"{source.format} in UTF-8 with a header line")
        with _open_text(source) as text:
            header = _read_header(_reader(text, source))
        _tell(source)
        if header is None:
            return None
        if (
            source.format == "tsv"
            and len(header) == 1
            and (other := next((one for one in ",;|" if one in header[0]), ""))
        ):
            remedy = f"Name it .csv, or set data.format: csv, which finds the {other!r}"
            raise not_as_named(source, "values between tabs", f"no tab in the header {header[0][:60]!r}", remedy)
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


def _tell(source: SourceFile) -> None:
    """Warn of what the first lines show that a user may not expect."""
    if source.format == "csv" and (separator := separator_of(source)) != ",":
        _say_once(f"{source.uri}: the first lines show that {separator!r} separates the values, not a comma")
    elif source.format == "tsv":
        with _open_text(source) as text:
            cells = [cell for line in islice(text, GUESS_LINES) for cell in line.rstrip("\r\n").split("\t")]
        if any(QUOTED.fullmatch(cell) for cell in cells):
            _say_once(
                f"{source.uri}: values stand in quotation marks, which are text in tsv; data.format: csv takes them off"
            )


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _open_text(source: SourceFile) -> io.TextIOWrapper:
    """Characters, with bytes that are not UTF-8 as lone surrogates, so that only their own row is lost."""
    stream = open_stream(source)
    first = EXCEL.match(stream.peek(16)) if source.format == "csv" else None
    stream.read(first.end() if first else 0)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def separator_of(source: SourceFile) -> str:
    """What separates the values: tabs in tsv; in csv what cuts most of the first lines into as many as the header."""
    if source.format == "tsv":
        return "\t"
    with _open_text(source) as text:
        lines = list(islice(text, GUESS_LINES))
    fits = {separator: _fitting(lines, separator) for separator in SEPARATORS}
    return max(SEPARATORS, key=lambda separator: fits[separator])  # the first of equals: the comma


def _fitting(lines: Sequence[str], separator: str) -> int:
    """Records with as many values as the header, if that has several."""
    try:
        widths = [len(cells) for cells in csv.reader(lines, delimiter=separator) if cells]
    except csv.Error:
        return 0
    return sum(width == widths[0] for width in widths) if widths and widths[0] > 1 else 0


def _reader(text: io.TextIOWrapper, source: SourceFile) -> "Iterator[list[str]]":
    csv.field_size_limit(MAX_FIELD_CHARS)
    if source.format == "tsv":
        return csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(text, delimiter=separator_of(source), strict=True)


def _read_header(reader: Iterator[list[str]]) -> list[str] | None:
    cells = next((cells for cells in reader if cells), None)
    return None if cells is None else [name.strip() for name in cells]


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
