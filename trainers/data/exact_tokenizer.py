"""tokenizers' ids as arrays, with a long text taken in slices: what tokenizers gives takes about 150 bytes a token and
Python's lists 40 more, so that a document of 64 MB at once would take 3.5 GB.

A text is cut before a blank between two words, where the tokenizer itself splits before it looks for tokens, and where
the text around has the same ids in one piece as in two. Where no such place is found, as with tokens that reach across
blanks, the text stays whole. Begin at `encode_exact`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from trainers.data.encoded import Array, Tokens, join_tokens

SLICE_CHARS = 2**20
"""About 50 MB of tokenizers' records."""
AROUND_CHARS = 512
"""Text on either side of a cut that is tokenized in one piece and in two."""
TRIES = 64
"""Blanks that are tried for one cut."""
CUT = re.compile(r"(?<=\w)\s(?=\w)")


def encode_exact(exact: Any, texts: Sequence[str]) -> Tokens:
    """Ids of texts without special tokens around.

    Args:
        exact: tokenizers' own tokenizer.
        texts: any number of any length.
    """
    parts: list[Tokens] = []
    waiting: list[str] = []
    for text in texts:
        if len(text) > SLICE_CHARS:
            parts += [_encode(exact, waiting), Tokens.of([_encode_long(exact, text)])]
            waiting = []
        else:
            waiting.append(text)
    return join_tokens([*parts, _encode(exact, waiting)])


def _encode(exact: Any, texts: Sequence[str]) -> Tokens:
    found = exact.encode_batch_fast(list(texts), add_special_tokens=False)
    return Tokens.of([one.ids for one in found])


def _encode_long(exact: Any, text: str) -> Array:
    return np.concatenate([_encode(exact, [one]).ids for one in slices(exact, text)])


def slices(exact: Any, text: str) -> Iterator[str]:
    """The text in consecutive slices whose ids, end to end, are those of the text."""
    start = 0
    while len(text) - start > SLICE_CHARS and (end := _find_cut(exact, text, start + SLICE_CHARS)) is not None:
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(exact: Any, text: str, near: int) -> int | None:
    """The first place from `near` on where the text may be cut; None where none is found."""
    for found in islice(CUT.finditer(text, near), TRIES):
        if _parts_agree(exact, text, found.start()):
            return found.start()
    return None


def _parts_agree(exact: Any, text: str, cut: int) -> bool:
    before, after = text[max(cut - AROUND_CHARS, 0) : cut], text[cut : cut + AROUND_CHARS]
    splitter = exact.pre_tokenizer
    if splitter is None or all(end != len(before) for _, (_, end) in splitter.pre_tokenize_str(before + after)):
        return False
    whole, first, second = exact.encode_batch_fast([before + after, before, after], add_special_tokens=False)
    return bool(whole.ids == first.ids + second.ids)
