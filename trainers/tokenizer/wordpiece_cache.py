"""A cache for WordPiece: BERT's normalizer and splitter work word by word, so a word's ids never depend on its
neighbours, and in a text beyond ASCII those of what stands between two blanks.

Such pieces are kept with their ids, and a batch becomes ids by one look-up a piece and one gather by numpy. Texts
with control characters or special tokens, and those without blanks beyond ASCII, are left to tokenizers.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from trainers.records import Array
from trainers.tokenizer.reference import encode_by_reference
from trainers.tokenizer.token_arrays import Tokens, join_tokens, starts_of

MOST_PIECES, MOST_CHARS = 500_000, 20_000_000
"""Pieces, and characters of them, that are remembered before all are forgotten: about 100 MB."""
MOST_PIECE_CHARS = 40
"""Mean length of the pieces between blanks from which on a text is left to tokenizers: they hardly ever come twice."""
SLICE_CHARS = 2**20
"""Longer texts are taken a slice at a time: a Python string a piece takes about 60 bytes."""
CONTROL = bytes([*range(9), 11, 12, *range(14, 32), 127])
"""What BERT's normalizer deletes in ASCII, so that what stands around it becomes one word."""
OTHER_CONTROL = re.compile(r"[\x80-\x9f]")
"""The same beyond ASCII, of which Python takes \\x85 as white space."""
WORD = re.compile(r"[0-9A-Za-z]+|[^\s0-9A-Za-z]")


class WordPieceCache:
    """Gives what tokenizers gives without special tokens around."""

    def __init__(self, reference: Any, lowercase: bool, added: Sequence[dict[str, Any]]) -> None:
        self._reference, self._lowercase = reference, lowercase
        self._added = re.compile("|".join(re.escape(one["content"].lower()) for one in added) or r"(?!)")
        self._ascii_alone = any(one["normalized"] for one in added)  # such are found in text without its accents
        self._pieces = _Pieces(reference)

    def encode(self, texts: list[str]) -> Tokens:
        parts: list[Tokens] = []
        waiting: list[list[str]] = []
        for text in texts:
            pieces = self._pieces_of(text) if len(text) <= SLICE_CHARS else None
            if pieces is None:
                parts += [self._pieces.encode(waiting), self._encode_alone(text)]
                waiting = []
            else:
                waiting.append(pieces)
        return join_tokens([*parts, self._pieces.encode(waiting)])

    def _pieces_of(self, text: str) -> list[str] | None:
        """Words, or what stands between blanks; None where the text is tokenizers' affair."""
        lowered, raw = text.lower(), text.encode()
        if len(raw.translate(None, CONTROL)) < len(raw) or self._added.search(lowered):
            return None
        if text.isascii():
            return WORD.findall(lowered if self._lowercase else text)
        if self._ascii_alone or OTHER_CONTROL.search(text):
            return None
        pieces = text.split()  # as they are: Python lowers some letters at a word's end otherwise than tokenizers does
        return pieces if len(text) <= MOST_PIECE_CHARS * (len(pieces) + 1) else None

    def _encode_alone(self, text: str) -> Tokens:
        """One text: slice by slice where it is long and every slice will do, else by tokenizers."""
        slices = list(_slices(text)) if len(text) > SLICE_CHARS and not self._added.search(text.lower()) else []
        ids: list[Array] = []
        for piece in slices:
            pieces = self._pieces_of(piece)
            if pieces is None:
                ids = []
                break
            ids.append(self._pieces.encode([pieces]).ids)
        return Tokens.of([np.concatenate(ids)]) if ids else encode_by_reference(self._reference, [text])


class _Pieces(dict[str, int]):
    """Numbers of pieces, given as they first come, and the ids of each."""

    def __init__(self, reference: Any) -> None:
        super().__init__()
        self._reference = reference
        self._new: list[str] = []
        self._ids, self._ends, self._chars = array("i"), array("q", [0]), 0

    def encode(self, texts: Sequence[list[str]]) -> Tokens:
        if len(self) > MOST_PIECES or self._chars > MOST_CHARS:
            self._forget()
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        numbers = np.fromiter(map(self.__getitem__, chain.from_iterable(texts)), np.int64, int(counts.sum()))
        self._learn()
        ids, ends = np.frombuffer(self._ids, np.int32), np.frombuffer(self._ends, np.int64)
        starts = ends[numbers]
        lengths = ends[numbers + 1] - starts
        offsets = starts_of(lengths)
        flat = ids[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)]
        return Tokens(flat, offsets[starts_of(counts)])

    def __missing__(self, piece: str) -> int:
        number = self[piece] = len(self)
        self._new.append(piece)
        return number

    def _learn(self) -> None:
        """Ask tokenizers for the ids of the new pieces, all at once: a call each takes 10 µs."""
        for piece, one in zip(
            self._new, self._reference.encode_batch_fast(self._new, add_special_tokens=False), strict=True
        ):
            self._ids.extend(one.ids)
            self._ends.append(len(self._ids))
            self._chars += len(piece)
        self._new = []

    def _forget(self) -> None:
        self.clear()
        self._ids, self._ends, self._chars = array("i"), array("q", [0]), 0


def _slices(text: str) -> Iterator[str]:
    """The text in slices that end with a blank, the last aside; one without a blank in reach stays whole."""
    start = 0
    while len(text) - start > SLICE_CHARS:
        end = text.rfind(" ", start, start + SLICE_CHARS) + 1
        if not end:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def open_wordpiece_cache(config: dict[str, Any], reference: Any) -> WordPieceCache | None:
    """For a tokenizer with BERT's normalizer, splitter and WordPiece; None for all others."""
    kinds = [(config.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or not config["normalizer"].get("clean_text"):
        return None
    return WordPieceCache(reference, config["normalizer"]["lowercase"], config["added_tokens"])
