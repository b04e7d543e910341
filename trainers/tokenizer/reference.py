"""tokenizers' ids as arrays, with a long text taken in slices: what tokenizers gives takes about 150 bytes a token and
Python's lists 40 more, so that a document of 64 MB at once would take 3.5 GB.

A text is cut before a blank between two words, or where there is none before a punctuation mark; in any case where the
tokenizer itself splits before it looks for tokens, and where the text around has the same ids in one piece as in two.
Where no such place is found, as with tokens that reach across blanks, the text stays whole.
Begin at `encode_by_reference`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from trainers.records import Array
from trainers.tokenizer.token_arrays import Tokens, join_tokens

SLICE_CHARS = 2**20
"""About 50 MB of tokenizers' records."""
AROUND_CHARS = 512
"""Text on either side of a cut that is tokenized in one piece and in two."""
TRIES, WINDOW_CHARS = 64, 2**16
"""Places of one kind that are tried for one cut, and how far behind the wished-for place they may lie."""
CUTS = (re.compile(r"(?<=\w)\s(?=\w)"), re.compile(r"(?<=\w)(?=[^\w\s])"))


def encode_by_reference(reference: Any, texts: Sequence[str]) -> Tokens:
    """Ids of texts without special tokens around.

    Args:
        reference: tokenizers' own tokenizer.
        texts: any number of any length.
    """
    parts: list[Tokens] = []
    waiting: list[str] = []
    for text in texts:
        if len(text) > SLICE_CHARS:
            ids = [_encode(reference, [piece]).ids for piece in slices(reference, text)]  # one by one, for the memory
            parts += [_encode(reference, waiting), Tokens.of([np.concatenate(ids)])]
            waiting = []
        else:
            waiting.append(text)
    return join_tokens([*parts, _encode(reference, waiting)])


def _encode(reference: Any, texts: Sequence[str]) -> Tokens:
    encodings = reference.encode_batch_fast(list(texts), add_special_tokens=False)
    return Tokens.of([encoding.ids for encoding in encodings])


def slices(reference: Any, text: str) -> Iterator[str]:
    """The text in consecutive slices whose ids, end to end, are those of the text."""
    start = 0
    while len(text) - start > SLICE_CHARS and (end := _find_cut(reference, text, start + SLICE_CHARS)) is not None:
        yield text[start:end]
        start = end
    yield text[start:]


def encode_words(reference: Any, texts: Sequence[str]) -> list[tuple[Array, Array]]:
    """Ids of each text without special tokens around, and the word that each belongs to, -1 for none; int32 both."""
    short = [text for text in texts if len(text) <= SLICE_CHARS]
    encodings = iter(reference.encode_batch(short, add_special_tokens=False))  # encode_batch_fast knows no words
    return [
        _ids_and_words(next(encodings)) if len(text) <= SLICE_CHARS else _words_of_slices(reference, text)
        for text in texts
    ]


def _words_of_slices(reference: Any, text: str) -> tuple[Array, Array]:
    ids, words, before = [], [], 0
    for piece in slices(reference, text):
        some, own = _ids_and_words(reference.encode(piece, add_special_tokens=False))
        ids.append(some)
        words.append(np.where(own >= 0, own + before, own))
        before += int(own.max(initial=-1)) + 1
    return np.concatenate(ids), np.concatenate(words)


def _ids_and_words(encoding: Any) -> tuple[Array, Array]:
    words = [-1 if word is None else word for word in encoding.word_ids]
    return np.array(encoding.ids, dtype=np.int32), np.array(words, dtype=np.int32)


def _find_cut(reference: Any, text: str, near: int) -> int | None:
    """The first place from `near` on where the text may be cut; None where none is found."""
    for cut in CUTS:
        for found in islice(cut.finditer(text, near, near + WINDOW_CHARS), TRIES):
            if _parts_agree(reference, text, found.start()):
                return found.start()
    return None


def _parts_agree(reference: Any, text: str, cut: int) -> bool:
    before, after = text[max(cut - AROUND_CHARS, 0) : cut], text[cut : cut + AROUND_CHARS]
    splitter = reference.pre_tokenizer
    if splitter is None or all(end != len(before) for _, (_, end) in splitter.pre_tokenize_str(before + after)):
        return False
    whole, first, second = reference.encode_batch_fast([before + after, before, after], add_special_tokens=False)
    return bool(whole.ids == first.ids + second.ids)
