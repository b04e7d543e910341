"""json: one document that is a list of objects, or an object whose key `data` holds that list.

Read whole but streamed element by element, so memory holds one element and a block, not the file. Rows are numbered
from 0. An element that is not an object is a malformed row; a document that is not JSON is refused.
"""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from trainers.sources.files import SourceFile
from trainers.sources.formats.base import PEEK_ROWS, RawRow, Span, has_lone_surrogate, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head
from trainers.sources.formats.squad import questions

EXPECTED = "a JSON list of objects, or an object with such a list under `data`"
BLOCK_CHARS = 2**20
MAX_ELEMENT_CHARS = 2**28
ROWS_KEY = "data"
INDEX_KEYS = frozenset({"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"})
"""One of these has each entry of an index of data sets."""


class Document:
    """A JSON document."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        read_text_head(source, EXPECTED)
        rows = [row for _, row in islice(self.read(source, Span(), ()), PEEK_ROWS)]
        if rows and not any(row is not None for row in rows):
            raise not_as_named(source, EXPECTED, "a list whose elements are not objects", RENAME)
        return tuple(dict.fromkeys(key for row in rows for key in row or ())) if rows else None

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        return [Span()] if source.size else []

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Elements in order. Raises DataError at the place where the document stops being JSON."""
        if not source.size:
            return
        with io.TextIOWrapper(open_stream(source), encoding="utf-8-sig") as text:
            try:
                yield from enumerate(questions(_rows(_Cursor(text))))
            except (ValueError, RecursionError) as error:
                lines = "If it has one object a line, set data.format: jsonl or name it .jsonl"
                remedy = lines if "Extra data" in str(error) else RENAME
                raise not_as_named(source, EXPECTED, str(error), remedy) from error


class _Cursor:
    """A place in a JSON text, of which only a window is in memory.

    Not ijson: its parser refuses NaN and turns half a surrogate pair into a question mark.
    """

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self._window, self._at, self._ended = text, "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def next_char(self) -> str:
        """The next character that is not white space, not taken; empty at the end."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in " \t\r\n":
                    return self._window[self._at]
                self._at += 1
            self._fill()
            if self._ended:
                return ""

    def take(self, char: str) -> bool:
        is_next = self.next_char() == char
        self._at += is_next
        return is_next

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
                    escaped = "\\ud" in self._window[self._at : end].lower()
                    self._at = end
                    return None if escaped and has_lone_surrogate(json.dumps(value, ensure_ascii=False)) else value
            self._fill()

    def _fill(self) -> None:
        """Read on, at least doubling what is left, so that a long element is not scanned again and again."""
        rest = self._window[self._at :]
        block = self._text.read(max(BLOCK_CHARS, len(rest)))
        self._window, self._at, self._ended = rest + block, 0, not block


def _rows(cursor: _Cursor) -> Iterator[dict[str, Any] | None]:
    """The elements of the list, or of that under `data` of an object, whose other keys are passed over."""
    if cursor.take("["):
        yield from _elements(cursor)
    elif cursor.take("{"):
        keys: list[str] = []
        is_index = True
        while not cursor.take("}"):
            if keys:
                cursor.need(",")
            keys.append(str(cursor.value()))
            cursor.need(":")
            if keys[-1] == ROWS_KEY and cursor.take("["):
                yield from _elements(cursor)
            else:
                value = cursor.value()
                is_index = is_index and isinstance(value, dict) and not INDEX_KEYS.isdisjoint(value)
        if cursor.next_char():
            raise ValueError("Extra data: several objects one after another")
        if keys and is_index and ROWS_KEY not in keys:
            raise ValueError(
                "an index of data sets, as LLaMA-Factory's dataset_info.json; name the files that it lists"
            )
        if ROWS_KEY not in keys:
            raise ValueError(f"an object with the keys {', '.join(keys[:10])} and no list under `data`")
    else:
        raise ValueError(f"a document that begins with {cursor.next_char()!r}")
    if cursor.next_char():
        raise ValueError(f"Extra data after the document, {cursor.next_char()!r}")


def _elements(cursor: _Cursor) -> Iterator[dict[str, Any] | None]:
    if cursor.take("]"):
        return
    while True:
        value = cursor.value()
        yield value if isinstance(value, dict) else None
        if cursor.take("]"):
            return
        cursor.need(",")
