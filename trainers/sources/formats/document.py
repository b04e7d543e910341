"""json: one document that is a list of objects, or an object whose key `data` holds that list.

Read whole but streamed element by element, so memory holds one element and a block, not the file. Rows are numbered
from 0. An element that is not an object is a malformed row; a document that is not JSON is refused.
"""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from trainers.errors import DataError
from trainers.sources.files import SourceFile
from trainers.sources.formats.base import PEEK_ROWS, RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head
from trainers.sources.formats.squad import questions

EXPECTED = "a JSON list of objects, or an object with such a list under `data`"
BLOCK_CHARS = 2**20
MAX_ELEMENT_CHARS = 2**28
ROWS_KEY = "data"


class Document:
    """A JSON document."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        """Keys of the first elements."""
        read_text_head(source, EXPECTED)
        rows = [row for _, row in islice(self.read(source, Span(), ()), PEEK_ROWS)]
        if rows and not any(row is not None for row in rows):
            raise not_as_named(source, EXPECTED, "a list whose elements are not objects", RENAME)
        return tuple(dict.fromkeys(key for row in rows for key in row or ())) if rows else None

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        """The whole file."""
        return [Span()] if source.size else []

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Elements in order. Raises DataError at the place where the document stops being JSON."""
        if not source.size:
            return
        with io.TextIOWrapper(open_stream(source), encoding="utf-8-sig") as text:
            try:
                yield from enumerate(questions(_rows(_Cursor(text))))
            except (ValueError, RecursionError) as error:
                raise _refusal(source, error) from error


def _refusal(source: SourceFile, error: Exception) -> DataError:
    remedy = (
        "If it has one object a line, set data.format: jsonl or name it .jsonl"
        if "Extra data" in str(error)
        else RENAME
    )
    return not_as_named(source, EXPECTED, str(error), remedy)


class _Cursor:
    """A place in a JSON text, of which only a window is in memory."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text = text
        self._window = ""
        self._at = 0
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode

    def next_char(self) -> str:
        """The next character that is not white space, not taken; empty at the end."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in " \t\r\n":
                    return self._window[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, char: str) -> bool:
        """Move past this character if it comes next."""
        found = self.next_char() == char
        self._at += found
        return found

    def need(self, char: str) -> None:
        """Move past this character. Raises ValueError where another comes next."""
        if not self.take(char):
            raise ValueError(f"{self.next_char()!r} where {char!r} should be" if self.next_char() else "an early end")

    def value(self) -> Any:
        """The next value. Raises ValueError where there is none; returns None for one with half a surrogate pair."""
        self.next_char()
        while True:
            try:
                value, end = self._decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if self._ended or len(self._window) - self._at > MAX_ELEMENT_CHARS:
                    raise ValueError(f"{error.msg} at {self._window[self._at : self._at + 40]!r}") from None
            else:
                if end < len(self._window) or self._ended:  # at the window's edge a number could go on
                    raw, self._at = self._window[self._at : end], end
                    return value if "\\ud" not in raw.lower() or _carries(value) else None
            self._fill()

    def _fill(self) -> bool:
        """Read on, at least doubling what is left, so that a long element is not scanned again and again."""
        rest = self._window[self._at :]
        block = self._text.read(max(BLOCK_CHARS, len(rest)))
        self._ended = not block
        self._window, self._at = rest + block, 0
        return bool(block)


def _carries(value: Any) -> bool:
    return not has_lone_surrogate(json.dumps(value, ensure_ascii=False))


def _rows(cursor: _Cursor) -> Iterator[dict[str, Any] | None]:
    if cursor.take("["):
        yield from _elements(cursor)
    elif cursor.take("{"):
        yield from _wrapped(cursor)
    else:
        raise ValueError(f"a document that begins with {cursor.next_char()!r}")
    if cursor.next_char():
        raise ValueError(f"Extra data after the document, {cursor.next_char()!r}")


def _elements(cursor: _Cursor) -> Iterator[dict[str, Any] | None]:
    """The elements of a list whose bracket has been taken."""
    if cursor.take("]"):
        return
    while True:
        value = cursor.value()
        yield value if isinstance(value, dict) else None
        if cursor.take("]"):
            return
        cursor.need(",")


def _wrapped(cursor: _Cursor) -> Iterator[dict[str, Any] | None]:
    """The list under `data` of an object whose brace has been taken; its other keys are passed over."""
    keys: list[str] = []
    while not cursor.take("}"):
        if keys:
            cursor.need(",")
        keys.append(str(cursor.value()))
        cursor.need(":")
        if keys[-1] == ROWS_KEY and cursor.take("["):
            yield from _elements(cursor)
        else:
            cursor.value()
    if cursor.next_char():
        raise ValueError("Extra data: several objects one after another")
    if ROWS_KEY not in keys:
        raise ValueError(f"an object with the keys {', '.join(keys[:10])} and no list under `data`")
