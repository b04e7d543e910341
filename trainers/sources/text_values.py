"""Values that flat files hold as text: numbers, labels, and lists and objects as JSON, Python or numpy writes them.

pandas writes a column of lists that it read from parquet as numpy prints them, with blanks between the items and with
dots in place of most where there are over 1,000. Begin at `TEXT_VALUES`.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
WHOLE = re.compile(r"-?(0|[1-9]\d*)\.0+")
NUMPY = re.compile(r"""['"\w.\])}]\s+['"\w.\[{+-]|'\s*'|"\s*"|\.\.\.|\barray\(""")
"""What is there where numpy wrote; it may also stand inside an item."""
PART = re.compile(
    r"""(?P<blank>\s*)(?:(?P<value>[a-zA-Z]{0,2}(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))"""
    r"""|(?P<open>array\(|[\[({])|(?P<close>(?:,\s*(?:dtype|shape)=[^()\[\]]*(?:\([\d, ]*\))?)*\)|[\]}])"""
    r"""|(?P<mark>[,:])|(?P<dots>\.\.\.)|(?P<other>[^\s,:()\[\]{}'"]+))""",
    re.DOTALL,
)
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"]""")
SPEAKER = frozenset(("role", "from"))
"""One of these fields is in every message."""
CUT_SHORT = "list_cut_short_by_numpy"
"""The outcome of a row with a list whose items were replaced by dots."""


class CutShort(str):
    """The text of a list with dots in place of items, which nothing brings back."""

    __slots__ = ()


def read_number(text: str) -> Any:
    """A number written as text; other text as it is."""
    return float(text) if NUMBER.fullmatch(text) else text


def read_label(text: str) -> str:
    """A label of a format that knows text alone, as other formats have it: 1.0 is 1, true is True."""
    core = text.strip()
    if WHOLE.fullmatch(core):
        return text.replace(core, core.partition(".")[0])
    return text.replace(core, core.capitalize()) if core.lower() in ("true", "false") else text


def read_nested(text: str) -> Any:
    """A list or an object written as text; other text, and what can be read in two ways, as it is."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    for parse in (json.loads, _as_python):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            return value if isinstance(value, list | dict | CutShort) else text
    return text


def _as_python(text: str) -> Any:
    """Raises ValueError or SyntaxError where Python does not read it, or would read it otherwise than it was meant."""
    if not NUMPY.search(text):
        return ast.literal_eval(text)
    parts = list(_with_commas(text))
    return CutShort(text) if "..." in parts else ast.literal_eval("".join(parts))


def _with_commas(text: str) -> Iterator[str]:
    """The parts of a text that numpy may have written, as Python reads them: Python would join ['a' 'b'] to one item.

    Raises ValueError where a list has both commas and blanks between its items, or items with nothing between.
    """
    open_at: list[str] = []
    between: list[set[str]] = [set()]
    after_value, place, text = False, 0, text.strip()
    while place < len(text):
        part = PART.match(text, place)
        if part is None:
            raise ValueError(f"not a list at {text[place : place + 20]!r}")
        kind, place, core = str(part.lastgroup), part.end(), part[0][len(part["blank"]) :]
        if after_value and kind in ("value", "open", "other", "dots"):
            if open_at[-1:] != ["["] or not part["blank"]:
                raise ValueError(f"nothing stands before {core[:20]!r}")
            between[-1].add(" ")
            yield ","
        if kind == "open":
            open_at.append(core)
            between.append(set())
        elif kind == "close":
            if not open_at or len(between.pop()) > 1:
                raise ValueError("both commas and blanks between items")
            is_array = open_at.pop() == "array("
            core = core if core in "]}" or not is_array else ""
        elif core == ",":
            between[-1].add(core)
        after_value = kind not in ("open", "mark")
        yield "" if core == "array(" else core


def read_messages(text: str) -> Any:
    """A list of messages written as text; any other text, lists too, is what somebody says."""
    if not MESSAGES.match(text):
        return text
    value = read_nested(text)
    is_list = isinstance(value, list) and all(isinstance(each, dict) and each.keys() & SPEAKER for each in value)
    return value if isinstance(value, CutShort) or is_list else text


def read_decimal(value: Decimal) -> int | float:
    """A decimal number of a columnar file, as other formats have it."""
    return int(value) if value == value.to_integral_value() else float(value)


TEXT_VALUES: dict[str, Callable[[str], Any]] = {
    "score": read_number,
    "label": read_label,
    **dict.fromkeys(("messages", "conversations", "history", "tokens", "tags", "answers"), read_nested),
    **dict.fromkeys(("prompt", "completion"), read_messages),
}
"""Fields that ask for more than text, and what reads them."""
