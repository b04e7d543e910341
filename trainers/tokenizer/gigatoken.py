"""Faster ways to tokenizers' ids, checked on a sample of every batch: gigatoken, and a WordPiece cache.

gigatoken applies to byte-level and SentencePiece-style BPE. Texts with bytes that the vocabulary cannot spell go to
tokenizers, and so does a whole vocabulary that gigatoken does not load. Begin at `open_fast`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from trainers.errors import TuneyardError
from trainers.records import Array
from trainers.tokenizer.reference import encode_by_reference
from trainers.tokenizer.token_arrays import Tokens, add_affixes
from trainers.tokenizer.wordpiece_cache import open_wordpiece_cache

SAMPLE_CHARS = 20_000
"""A text drawn for the check is skipped the more often the longer it is than this: a check costs 1.4 µs a token."""
PROBE = "a"


class TokenizerDiffers(TuneyardError):
    """The faster library gave other ids than tokenizers does; the split has to be written with tokenizers."""


@dataclass(frozen=True)
class FastTokenizer:
    """A faster way to tokenizers' ids."""

    library: str
    bare: Callable[[list[str]], Tokens]
    """Gives the ids of texts without special tokens around."""
    prefix: Sequence[int]
    """Ids of the special tokens before a text."""
    suffix: Sequence[int]

    def encode(self, texts: list[str], special: bool) -> Tokens:
        """Ids of texts; `special` puts the special tokens around each."""
        tokens = self.bare(texts) if texts else Tokens.of([])
        return add_affixes(tokens, self.prefix, self.suffix) if special else tokens


class GigaTokenizer:
    """One vocabulary loaded by gigatoken; ids from `limit` on stand for bytes that the vocabulary does not have."""

    def __init__(self, giga: Any, reference: Any, limit: int) -> None:
        self._giga, self._reference, self._limit = giga, reference, limit

    def encode(self, texts: list[str]) -> Tokens:
        """Ids of texts; those that the vocabulary cannot spell are done by tokenizers."""
        layout = self._giga.encode_batch(texts, parallel=False).layout
        tokens = Tokens(np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data))
        if not len(tokens.ids) or int(tokens.ids.max()) < self._limit:
            return tokens
        places = np.unique(np.searchsorted(tokens.offsets, np.flatnonzero(tokens.ids >= self._limit), side="right") - 1)
        lists: list[Any] = [tokens[place] for place in range(len(tokens))]
        unspelled = encode_by_reference(self._reference, [texts[place] for place in places])
        for number, place in enumerate(places.tolist()):
            lists[place] = unspelled[number]
        return Tokens.of(lists)


def open_fast(backend_json: str, reference: Any) -> FastTokenizer | None:
    """The faster way for tokenizers' JSON; None if there is none, or if its special tokens are not simply around."""
    config = json.loads(backend_json)
    affixes = special_affixes(reference)
    if affixes is None:
        return None
    if giga := _open_giga(config, reference):
        return FastTokenizer("gigatoken", giga.encode, *affixes)
    if cache := open_wordpiece_cache(config, reference):
        return FastTokenizer("WordPiece cache", cache.encode, *affixes)
    return None


def _open_giga(config: dict[str, Any], reference: Any) -> GigaTokenizer | None:
    import gigatoken

    if config["model"].get("type") != "BPE":
        return None
    vocabulary = dict(config["model"]["vocab"])
    limit = max([*vocabulary.values(), *(one["id"] for one in config["added_tokens"]), -1]) + 1
    if not config["model"].get("byte_fallback"):
        # gigatoken asks for all 256 bytes; those that a vocabulary lacks get ids of their own, found again afterwards
        missing = [char for char in _byte_characters() if char not in vocabulary]
        vocabulary.update({char: limit + place for place, char in enumerate(missing)})
    whole = {**config, "model": {**config["model"], "vocab": vocabulary}}
    try:
        return GigaTokenizer(gigatoken.Tokenizer.from_json(json.dumps(whole)), reference, limit)
    except Exception:  # whatever it says, it does not load this vocabulary
        return None


def check_sample(texts: Sequence[str], tokens: Tokens, reference: Any, special: bool) -> None:
    """Compare one text of a batch, drawn by its content, with tokenizers' ids. Raises TokenizerDiffers."""
    if not len(texts):
        return
    seed = xxhash.xxh3_64_intdigest(tokens.offsets.tobytes())
    place = seed % len(texts)
    text = texts[place]
    if len(text) > SAMPLE_CHARS and seed / 2**64 > SAMPLE_CHARS / len(text):
        return
    expected, given = _expected(reference, text, special), tokens[place].tolist()
    if expected != given:
        at = next((i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), len(given))
        raise TokenizerDiffers(
            f"at token {at} of a text that begins with {text[:40]!r}, tokenizers gives {expected[at : at + 4]} "
            f"and the faster library {given[at : at + 4]}"
        )


def _expected(reference: Any, text: str, special: bool) -> list[int]:
    affixes = special_affixes(reference) if special else ([], [])
    if affixes is None:
        ids: list[int] = reference.encode(text).ids
        return ids
    prefix, suffix = affixes
    return [*prefix, *encode_by_reference(reference, [text])[0].tolist(), *suffix]


def bytes_of_ids(config: dict[str, Any]) -> Array | None:
    """Bytes that each id of a byte-level vocabulary stands for, int32 [vocabulary]; None for other vocabularies."""
    if config["model"].get("type") != "BPE" or byte_level_step(config.get("pre_tokenizer")) is None:
        return None
    added = {one["id"]: len(one["content"].encode()) for one in config["added_tokens"]}
    table = np.zeros(max([*config["model"]["vocab"].values(), *added, 0]) + 1, np.int32)
    for token, number in config["model"]["vocab"].items():
        table[number] = len(token)  # one character a byte
    for number, size in added.items():
        table[number] = size
    return table


def byte_level_step(step: Any) -> dict[str, Any] | None:
    """The byte-level part of a pre-tokenizer; None if it has none."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        return next((found for inner in step["pretokenizers"] if (found := byte_level_step(inner))), None)
    return step if step.get("type") == "ByteLevel" else None


def special_affixes(reference: Any) -> tuple[list[int], list[int]] | None:
    """Ids that the tokenizer puts before and after a text."""
    bare = reference.encode(PROBE, add_special_tokens=False).ids
    full = reference.encode(PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return None


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(others)]
