"""gigatoken in front of tokenizers: the same ids many times sooner, checked on a sample of every batch.

It applies to byte-level and SentencePiece-style BPE. Texts with bytes that the vocabulary cannot spell go to
tokenizers, and so does a whole vocabulary that gigatoken does not load. Begin at `open_quick`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from trainers.data.encoded import Array, Tokens, starts_of

SAMPLE_CHARS = 20_000
"""A text drawn for the check is skipped the more often the longer it is than this: a check costs 1.4 µs a token."""
PROBE = "a"


class TokenizerDiffers(Exception):
    """The quick library gave other ids than tokenizers does; the split has to be written with tokenizers."""


class QuickTokenizer:
    """One tokenizer loaded by gigatoken.

    Args:
        quick: gigatoken's tokenizer.
        exact: tokenizers' own.
        limit: ids from here on stand for bytes that the vocabulary does not have.
    """

    def __init__(self, quick: Any, exact: Any, limit: int, prefix: Sequence[int], suffix: Sequence[int]) -> None:
        self._quick, self._exact, self._limit = quick, exact, limit
        self._prefix, self._suffix = np.array(prefix, np.int32), np.array(suffix, np.int32)

    def encode(self, texts: list[str], special: bool) -> Tokens:
        """Ids of texts; `special` puts the special tokens around each."""
        if not texts:
            return Tokens.of([])
        layout = self._quick.encode_batch(texts, parallel=False).layout
        tokens = Tokens(np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data))
        if len(tokens.ids) and int(tokens.ids.max()) >= self._limit:
            tokens = self._spelled_out(texts, tokens)
        return self._surrounded(tokens) if special and (len(self._prefix) or len(self._suffix)) else tokens

    def _spelled_out(self, texts: list[str], tokens: Tokens) -> Tokens:
        """The same with the texts that the vocabulary cannot spell done by tokenizers."""
        places = np.unique(np.searchsorted(tokens.offsets, np.flatnonzero(tokens.ids >= self._limit), side="right") - 1)
        exact = self._exact.encode_batch_fast([texts[place] for place in places], add_special_tokens=False)
        lists: list[Any] = [tokens[place] for place in range(len(tokens))]
        for place, one in zip(places.tolist(), exact, strict=True):
            lists[place] = one.ids
        return Tokens.of(lists)

    def _surrounded(self, tokens: Tokens) -> Tokens:
        before, after = len(self._prefix), len(self._suffix)
        offsets = starts_of(tokens.lengths + before + after)
        ids = np.empty(offsets[-1], np.int32)
        inner = np.arange(len(tokens.ids)) + np.repeat(
            offsets[:-1] + before - tokens.offsets[:-1] + tokens.offsets[0], tokens.lengths
        )
        ids[inner] = tokens.ids
        for place in range(before):
            ids[offsets[:-1] + place] = self._prefix[place]
        for place in range(after):
            ids[offsets[1:] - after + place] = self._suffix[place]
        return Tokens(ids, offsets)


def open_quick(backend_json: str, exact: Any) -> QuickTokenizer | None:
    """gigatoken's tokenizer for tokenizers' JSON, or None where it does not load it or cannot add its specials."""
    import gigatoken

    config = json.loads(backend_json)
    around = _specials_around(exact)
    if config["model"].get("type") != "BPE" or around is None:
        return None
    vocabulary = config["model"]["vocab"]
    limit = max([*vocabulary.values(), *(one["id"] for one in config["added_tokens"]), -1]) + 1
    if not config["model"].get("byte_fallback"):
        # gigatoken asks for all 256 bytes; those that a vocabulary lacks get ids of their own, found again afterwards
        missing = [char for char in _byte_characters() if char not in vocabulary]
        vocabulary.update({char: limit + place for place, char in enumerate(missing)})
    try:
        quick = gigatoken.Tokenizer.from_json(json.dumps(config))
    except Exception:  # whatever it says, it does not load this vocabulary
        return None
    return QuickTokenizer(quick, exact, limit, *around)


def check_sample(texts: Sequence[str], tokens: Tokens, exact: Any, special: bool) -> None:
    """Compare one text of a batch, drawn by its content, with tokenizers' ids. Raises TokenizerDiffers."""
    if not len(texts):
        return
    seed = xxhash.xxh3_64_intdigest(tokens.offsets.tobytes())
    place = seed % len(texts)
    text = texts[place]
    if len(text) > SAMPLE_CHARS and seed / 2**64 > SAMPLE_CHARS / len(text):
        return
    expected, found = exact.encode(text, add_special_tokens=special).ids, tokens[place].tolist()
    if expected != found:
        at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
        raise TokenizerDiffers(
            f"at token {at} of a text that begins with {text[:40]!r}, tokenizers gives {expected[at : at + 4]} "
            f"and gigatoken {found[at : at + 4]}"
        )


def bytes_of_ids(config: dict[str, Any]) -> Array | None:
    """Bytes that each id of a byte-level vocabulary stands for, int32 [vocabulary]; None for other vocabularies."""
    if config["model"].get("type") != "BPE" or not _is_byte_level(config.get("pre_tokenizer")):
        return None
    added = {one["id"]: len(one["content"].encode()) for one in config["added_tokens"]}
    table = np.zeros(max([*config["model"]["vocab"].values(), *added, 0]) + 1, np.int32)
    for token, number in config["model"]["vocab"].items():
        table[number] = len(token)  # one character a byte
    for number, size in added.items():
        table[number] = size
    return table


def _is_byte_level(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Sequence":
        return any(_is_byte_level(one) for one in step["pretokenizers"])
    return bool(step.get("type") == "ByteLevel")


def _specials_around(exact: Any) -> tuple[list[int], list[int]] | None:
    """Ids that the tokenizer puts before and after a text."""
    bare = exact.encode(PROBE, add_special_tokens=False).ids
    full = exact.encode(PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return None


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(others)]
