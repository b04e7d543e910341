"""csv and tsv: a header line, then one row a record, numbered from 0. Every value is a string; an empty one is null.

csv quotes as RFC 4180 says, line breaks within quotes included; `;`, tabs or `|` in place of commas are found by the
first lines, and said. tsv has no quoting at all (IANA text/tab-separated-values), so quotation marks in it are text; a
warning says so where the first lines look quoted. A first line `sep=;`, as Excel writes it, is passed over.
Read whole, streamed, since quotes forbid splitting. A quotation mark that is never closed, or only by that of a later
row, makes one record of many rows: such a file is refused, with the line.
"""

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any, Literal

from trainers.errors import DataError
from trainers.sources.files import SourceFile
from trainers.sources.formats.base import RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head

log = logging.getLogger(__name__)
SEPARATORS = (",", ";", "\t", "|")
GUESS_LINES = 50
EXCEL = re.compile(rb"(?:\xef\xbb\xbf)?sep=[,;|\t]\r?\n")
QUOTED = re.compile(r'"(?:[^"]|"")*"')
CHANCE = 20
"""So many separators within quotation marks, in each line as many as in the header, do not stand there by chance."""
MAX_FIELD_CHARS = 2**28
"""Past this an unclosed quotation mark is given up, rather than reading the rest of the file into memory."""


class Delimited:
    """Both delimited formats."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        read_text_head(source, f"{source.format} in UTF-8 with a header line")
        with _open_text(source) as text:
            header = _Records(text, source).header
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
            yield from enumerate(_Records(text, source))


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


def _has_excel_line(source: SourceFile) -> bool:
    with open_stream(source) as stream:
        return EXCEL.match(stream.peek(16)) is not None


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


class _Records:
    """The records of a file, as its header names their values."""

    def __init__(self, text: io.TextIOWrapper, source: SourceFile) -> None:
        csv.field_size_limit(MAX_FIELD_CHARS)
        self._source, self._separator = source, separator_of(source)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if source.format == "tsv" else csv.QUOTE_MINIMAL
        self._reader = csv.reader(text, delimiter=self._separator, quoting=quoting, strict=True)
        self._skipped = 1 if source.format == "csv" and _has_excel_line(source) else 0
        self._before = 0
        self.header = self._read_header()

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """Each record; None where it has more or fewer values than the header. Raises DataError where rows are lost."""
        header = self.header
        while header is not None:
            try:
                cells = self._next()
            except StopIteration:
                return
            if cells == []:
                continue  # a blank line
            if cells is not None and self._reader.line_num > self._before + 1:
                self._look_for_rows_within(cells, len(header))
            if cells is None or len(cells) != len(header) or has_lone_surrogate("".join(cells)):
                yield None
            else:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}

    def _next(self) -> list[str] | None:
        """The next record, None where its quotation marks are torn within one line."""
        self._before = self._reader.line_num
        try:
            return next(self._reader)
        except csv.Error as error:
            if "end of data" in str(error):
                raise self._swallowed("which is never closed") from error
            if self._reader.line_num > self._before + 1:
                raise self._swallowed(f"which is closed where no value ends ({error})") from error
            return None

    def _read_header(self) -> list[str] | None:
        with suppress(StopIteration):
            while (cells := self._next()) == []:
                pass
            if cells is None:
                raise not_as_named(self._source, "a header line", "torn quotation marks in it", RENAME)
            return [name.strip() for name in cells]
        return None

    def _look_for_rows_within(self, cells: Sequence[str], width: int) -> None:
        """Warn of a record of several lines that would be rows without quotation marks, or refuse it: where it is too
        much for a chance, or has another number of values than the header."""
        lines = self._separator.join(cells).split("\n")
        fits = [line.count(self._separator) == width - 1 for line in lines]
        is_block = all(fits) and (len(lines) - 2) * (width - 1) >= CHANCE
        if is_block or (len(cells) != width and any(fits[1:-1])):
            raise self._swallowed("and its lines are rows of their own")
        if all(fits) and len(lines) > 2 and width > 1:
            _say_once(f"{self._source.uri}: {self._lines()} are one row by quotation marks, and look like rows each")

    def _swallowed(self, what: str) -> DataError:
        return DataError(
            f"{self._source.uri}: {self._lines()} are one record by the quotation mark that opens it, {what}. Close "
            "that mark, write it twice where it is text, or leave the line out; where marks are text throughout, write "
            "the values between tabs and set data.format: tsv"
        )

    def _lines(self) -> str:
        first, last = self._before + 1 + self._skipped, self._reader.line_num + self._skipped
        return f"lines {first:,} to {last:,}" if last > first else f"line {first:,}"
