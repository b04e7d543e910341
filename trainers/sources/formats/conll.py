"""conll: a word a line with its columns, a blank line between sentences, as tagged text is published.

Columns are separated by tabs or spaces, any number of them: the first are the `tokens`, the last the `tags`, and each
goes by its number from 1 too (`data.columns: {tags: "2"}`). Of CoNLL-U (ten columns, the first an id) the second are
the tokens and the fourth the tags; its lines of ids such as 1-2 and 1.1 are no words. -DOCSTART- lines and comments
(`# ...` lines that are no word) are passed over. Rows are sentences, numbered from 0; read whole, streamed. A sentence
whose lines differ in their number of columns, or that is not UTF-8, is malformed.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from trainers.sources.files import SourceFile
from trainers.sources.formats.base import PEEK_ROWS, RawRow, Span, not_as_named, open_stream
from trainers.sources.formats.sniff import RENAME, read_text_head

EXPECTED = "a word a line with its columns, and a blank line between sentences"
DOCUMENT = "-DOCSTART-"
BLANKS = " \t"
BOM = "\ufeff"
TAG = re.compile(r"O|[BIEMSUL](-.+)?")
UNIVERSAL = 10
"""Columns of CoNLL-U."""
WORD_ID, OTHER_ID = re.compile(r"\d+"), re.compile(r"\d+[-.]\d+")


class Conll:
    """Tagged sentences in columns."""

    def peek(self, source: SourceFile) -> tuple[str, ...] | None:
        read_text_head(source, EXPECTED)
        rows = [row for _, row in islice(self.read(source, Span(), ()), PEEK_ROWS)]
        if rows and not any(rows):
            raise not_as_named(source, EXPECTED, "sentences whose lines differ in their number of columns", RENAME)
        return tuple(dict.fromkeys(name for row in rows for name in row or ())) if rows else None

    def plan(self, source: SourceFile, unit_bytes: int) -> list[Span]:
        return [Span()] if source.size else []

    def read(self, source: SourceFile, span: Span, columns: Sequence[str]) -> Iterator[RawRow]:
        """Sentences in order."""
        return enumerate(row for lines in _sentences(source) if (row := _row(lines)) != {})


def _sentences(source: SourceFile) -> Iterator[list[str] | None]:
    """The lines of each sentence; None where they are not UTF-8."""
    lines: list[bytes] = []
    with open_stream(source) as stream:
        for line in stream:
            if not line.isspace():
                lines.append(line)
            elif lines:
                yield _decoded(lines)
                lines = []
        if lines:
            yield _decoded(lines)


def _decoded(lines: Sequence[bytes]) -> list[str] | None:
    try:
        return b"".join(lines).decode().removeprefix(BOM).rstrip("\r\n").split("\n")
    except UnicodeDecodeError:
        return None


def _row(lines: list[str] | None) -> dict[str, Any] | None:
    """The columns of a sentence; None where it is malformed, empty where there are no words."""
    if lines is None:
        return None
    cells = [_cells(line.rstrip("\r")) for line in lines]
    cells = [line for line in cells if line[0] != DOCUMENT]
    width = next((len(line) for line in cells if not line[0].startswith("#")), max(map(len, cells), default=0))
    words: list[list[str]] = []
    for line in cells:
        if not line[0].startswith("#") or _is_word(line, width, bool(words)):
            words.append(line)
    if any(len(line) != width for line in words):
        return None
    if width == UNIVERSAL and all(WORD_ID.fullmatch(line[0]) or OTHER_ID.fullmatch(line[0]) for line in words):
        return _named([line for line in words if WORD_ID.fullmatch(line[0])], 1, 3)
    return _named(words, 0, width - 1)


def _cells(line: str) -> list[str]:
    """The columns of a line: other white space, such as a no-break or an ideographic space, belongs to the words."""
    return [cell.strip(BLANKS) for cell in line.split("\t")] if "\t" in line else re.split(" +", line.strip(BLANKS))


def _is_word(line: Sequence[str], width: int, within: bool) -> bool:
    """Whether a line that begins with # is a word: it has a word's columns, and stands within or ends with a tag."""
    return len(line) == width > 1 and (within or bool(TAG.fullmatch(line[-1])))


def _named(words: Sequence[Sequence[str]], token: int, tag: int) -> dict[str, Any]:
    if not words:
        return {}
    columns = [list(column) for column in zip(*words, strict=True)]
    row: dict[str, Any] = {str(number): column for number, column in enumerate(columns, 1)}
    return {**row, "tokens": columns[token]} | ({"tags": columns[tag]} if len(columns) > 1 else {})
