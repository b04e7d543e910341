"""jsonl and text: one row a line. Plain files are split at line starts, so that one big file uses every core.

A row's identity is the byte offset of its line's start (in the decompressed stream). A line that is blank or only
white space is not a row. Lines end with LF or CRLF; a UTF-8 byte order mark at the start is skipped.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import orjson

from trainers.errors import DataError
from trainers.sources.files import SourceFile
from trainers.sources.formats.base import PEEK_ROWS, RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head

BOM = b"\xef\xbb\xbf"
PEEK_BYTES = 32 * 2**20


class Lines:
    """Both line formats; the source's own format says how a line is parsed."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        """Keys of the first rows. A file none of whose first rows can be parsed is refused; one that is merely
        damaged here and there is left to the ledger.
        """
        read_text_head(source, EXPECTED[source.format])
        keys: dict[str, None] = {}
        total = parsed = 0
        for offset, row in islice(self.read(source, Span(), ()), PEEK_ROWS):
            total, parsed = total + 1, parsed + (row is not None)
            keys.update(dict.fromkeys(row or ()))
            if offset > PEEK_BYTES:
                break
        if total and not parsed:
            raise _refusal(source)
        return tuple(keys) if total else None

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        """Byte ranges of equal size; compressed files whole."""
        if source.compression:
            return [Span()] if source.size else []
        return [Span(start, min(start + unit_bytes, source.size)) for start in range(0, source.size, unit_bytes)]

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Rows of the lines that start within the span."""
        parse = parse_object if source.format == "jsonl" else _parse_text
        return ((offset, parse(line)) for offset, line in iterate_lines(source, span))


EXPECTED = {"jsonl": "one JSON object a line", "text": "text in UTF-8"}


def iterate_lines(source: SourceFile, span: Span) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes, line end removed, of each line that is not blank and starts within the span."""
    with open_stream(source) as stream:
        offset = span.start
        if offset:  # the byte before decides whether a line starts here
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        for line in stream:
            if span.stop is not None and offset >= span.stop:
                return
            start, offset = offset, offset + len(line)
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if start == 0:
                line = line.removeprefix(BOM)
            if line and not line.isspace():
                yield start, line


def parse_object(line: bytes) -> dict[str, Any] | None:
    """A JSON object, or None where the line is not one, is not UTF-8, or holds half a surrogate pair."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _parse_as_python_does(line)
    return value if isinstance(value, dict) else None


def _parse_as_python_does(line: bytes) -> Any:
    """What orjson refuses and Python's reader takes (NaN, deeper nesting); None for what neither does."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if b"\\ud" in line or b"\\uD" in line:
        return None if has_lone_surrogate(json.dumps(value, ensure_ascii=False)) else value
    return value


def _parse_text(line: bytes) -> dict[str, Any] | None:
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError:
        return None


def _refusal(source: SourceFile) -> DataError:
    _, line = next(iterate_lines(source, Span()))
    start = line[:60].decode(errors="replace")
    remedy = RENAME
    if source.format == "jsonl" and start.lstrip()[:1] in ("[", "{"):
        remedy = "If it is one JSON document, set data.format: json or name it .json"
    return not_as_named(source, EXPECTED[source.format], f"lines such as {start!r}", remedy)
