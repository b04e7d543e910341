"""Bits per byte of text, which compares language models whatever their vocabularies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from trainers.records import Array
from trainers.tasks.base import IGNORE

if TYPE_CHECKING:
    from trainers.tokenizer.encoder import Encoder

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(encoder: Encoder) -> Array:
    """UTF-8 bytes that each token stands for, int64 [vocabulary]; special tokens stand for none.

    Exact for byte-level vocabularies, whose tokens write one character a byte, and for those that write a byte as
    <0x41> and a blank as U+2581. Of a WordPiece vocabulary, those of the normalized words: it keeps no blanks.
    """
    tokenizer = encoder.tokenizer
    names, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    backend = tokenizer.backend_tokenizer
    byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
    inside = getattr(backend.model, "continuing_subword_prefix", None) or ""
    added = tokenizer.added_tokens_encoder
    lengths = np.zeros(max(names.values(), default=0) + 1, dtype=np.int64)
    for name, number in names.items():
        if name in special:
            continue
        if byte_level and name not in added:
            lengths[number] = len(name)
        elif BYTE_TOKEN.fullmatch(name):
            lengths[number] = 1
        else:
            lengths[number] = len(name.removeprefix(inside).replace("\u2581", " ").encode())
    return lengths


def target_bytes(lengths: Array, labels: Array, document: Array, count: int) -> Array:
    """Bytes that the targets of each document stand for, int64 [count].

    Args:
        lengths: what `token_bytes` gave.
        labels: int64 [batch, seq].
        document: int64 [batch, seq], which document a position belongs to.
        count: number of documents.
    """
    wanted = labels != IGNORE
    held: Array = np.bincount(document[wanted], weights=lengths[labels[wanted]], minlength=count).astype(np.int64)
    return held


def bits_per_byte(row_scores: Mapping[str, Array]) -> float:
    """Loss of all targets in bits over the bytes they stand for."""
    bits = float(row_scores["loss_sum"].sum()) / math.log(2)
    return bits / max(float(row_scores["bytes"].sum()), 1.0)
