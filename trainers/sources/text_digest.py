"""What a row says, as text and as a digest: the same for rows that differ in case and in white space around them.

Labels, tags and roles do not count: a text is the same text whatever is said about it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from trainers.records import Array

SLICE_CHARS = 2**20
SILENT = frozenset({"label", "score", "tags", "role", "from", "id", "title", "answer_start"})
"""Keys whose values are about the text, or name it, rather than being part of it."""


def text_of(fields: Mapping[str, Any]) -> str:
    """All that a row says, field after field."""
    if len(fields) == 1 and isinstance(only := next(iter(fields.values())), str):
        return only
    said: list[str] = []
    for key, value in fields.items():
        if key not in SILENT:
            said += (value,) if isinstance(value, str) else _strings(value)
    return said[0] if len(said) == 1 else "\n".join(said)


def text_digest(fields: Mapping[str, Any]) -> int:
    """64 bits of xxh3 over the plain text, slice by slice: a copy of a 64 MB document can take 256 MB."""
    text = text_of(fields).strip()
    if len(text) <= SLICE_CHARS:
        return int(xxhash.xxh3_64_intdigest(text.lower().encode()))
    digest = xxhash.xxh3_64()
    for start in range(0, len(text), SLICE_CHARS):
        digest.update(text[start : start + SLICE_CHARS].lower().encode())
    return int(digest.intdigest())


def plain(text: str) -> bytes:
    """A text in lower case without white space around it: what is compared of it."""
    return text.strip().lower().encode()


def text_digests(rows: Iterable[Mapping[str, Any] | None]) -> Array:
    """Digest of each row, uint64 [rows]; 0 where it is malformed."""
    return np.array([0 if fields is None else text_digest(fields) for fields in rows], dtype=np.uint64)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in SILENT:
                yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
