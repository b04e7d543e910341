"""WordPiece by remembered words: BERT's normalizer and splitter work word by word, so a word's ids never depend on its
neighbours. Takes texts in plain ASCII without special tokens; the others are tokenizers' own.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainers.data.encoded import Tokens, starts_of

MOST_WORDS = 500_000
"""Words remembered before all are forgotten: about 100 MB."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
WORD = re.compile(r"[0-9A-Za-z]+|[^\s0-9A-Za-z]")


class WordTokenizer:
    """Gives what tokenizers gives without special tokens around."""

    def __init__(self, exact: Any, lowercase: bool, added: Sequence[str]) -> None:
        self._exact, self._lowercase = exact, lowercase
        self._added = re.compile("|".join(re.escape(content.lower()) for content in added) or r"(?!)")
        self._ids = _Words(exact)

    def encode(self, texts: list[str]) -> Tokens:
        """Ids of texts."""
        if len(self._ids) > MOST_WORDS:
            self._ids.clear()
        lists = [self._by_words(text) for text in texts]
        left = [place for place, ids in enumerate(lists) if ids is None]
        exact = self._exact.encode_batch_fast([texts[place] for place in left], add_special_tokens=False)
        for place, one in zip(left, exact, strict=True):
            lists[place] = one.ids
        found: list[Any] = lists
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        flat = np.fromiter((number for ids in found for number in ids), np.int32, int(lengths.sum()))
        return Tokens(flat, starts_of(lengths))

    def _by_words(self, text: str) -> list[int] | None:
        lowered = text.lower()
        if not text.isascii() or CONTROL.search(text) or self._added.search(lowered):
            return None
        ids: list[int] = []
        known = self._ids
        for word in WORD.findall(lowered if self._lowercase else text):
            ids += known[word]
        return ids


class _Words(dict[str, list[int]]):
    """Ids by word, asked of tokenizers once."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self._exact = exact

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._exact.encode(word, add_special_tokens=False).ids
        self[word] = ids
        return ids


def open_words(config: dict[str, Any], exact: Any) -> WordTokenizer | None:
    """For a tokenizer with BERT's normalizer, splitter and WordPiece; None for all others."""
    kinds = [(config.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or not config["normalizer"].get("clean_text"):
        return None
    return WordTokenizer(exact, config["normalizer"]["lowercase"], [one["content"] for one in config["added_tokens"]])
