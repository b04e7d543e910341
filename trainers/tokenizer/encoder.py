"""The model's tokenizer, as the data stage uses it: batches of texts in, ids and character offsets out.

`load_encoder` reads it with transformers, once; `Encoder.spec` is what other processes need in order to have the same
one in milliseconds, without transformers. Which library makes the ids: see `gigatoken`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from trainers.errors import DataError, JobError
from trainers.records import Array
from trainers.tokenizer.gigatoken import (
    FastTokenizer,
    bytes_of_ids,
    check_sample,
    open_fast,
    special_affixes,
)
from trainers.tokenizer.languages import Affixes, first_tokens, target_affixes
from trainers.tokenizer.reference import encode_by_reference, encode_words
from trainers.tokenizer.token_arrays import Tokens, add_affixes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Files of a model folder that decide which ids a text becomes; their digest is part of the shard key."""
PROBE = "a"
ASCII_BLANKS = tuple(" \t\r\n")
NO_TOKENIZER = (
    "model.path: {folder} holds no tokenizer: put the model's tokenizer.json and tokenizer_config.json beside its "
    "config.json; only `tuneyard plan` does without"
)


def tokenizer_files(folder: Path) -> list[str]:
    """Those that a model folder holds."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as one process hands it to another."""

    folder: str
    trust_remote_code: bool
    backend: str
    """tokenizers' own JSON."""
    eos_id: int | None
    pad_id: int
    target: Affixes | str | None = None
    """As `target_affixes` gives it."""


class Encoder:
    """A fast (Rust) tokenizer without padding or truncation of its own.

    Args:
        spec: what `read_spec` gave, in this process or another.
        fast: use a faster library than tokenizers where it loads this tokenizer; its ids are checked on a sample.
    """

    def __init__(self, spec: TokenizerSpec, fast: bool = True) -> None:
        self.spec = spec
        self.fast = fast

    @cached_property
    def _backend(self) -> Any:
        """Opened when the first ids are asked for, and `_fast` too: an export asks for none, and both together take
        45 MiB for 50,000 words."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.spec.backend)

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        return open_fast(self.spec.backend, self._backend) if self.fast else None

    @cached_property
    def tokenizer(self) -> Any:
        return _load_tokenizer(self.spec.folder, self.spec.trust_remote_code)

    @cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether the model beside the tokenizer reads with one part and writes with another."""
        file = Path(self.spec.folder) / "config.json"
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("is_encoder_decoder", False))

    @property
    def eos_id(self) -> int | None:
        return self.spec.eos_id

    @property
    def pad_id(self) -> int:
        """Id that fills short sequences; never attended to, never a target."""
        return self.spec.pad_id

    @property
    def library(self) -> str:
        """What makes the ids: gigatoken, WordPiece cache or tokenizers."""
        return self._fast.library if self._fast else "tokenizers"

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]] | None:
        """Special tokens before and after a text; None where they are not simply around it."""
        return special_affixes(self._backend)

    @property
    def target_affixes(self) -> Affixes | None:
        """Special tokens before and after a target; None where they are those of every text. Raises JobError where the
        tokenizer does not say which language a target is in."""
        if isinstance(self.spec.target, str):
            raise JobError(f"model.path: {self.spec.target}")
        return self.spec.target

    def other_language(self, row: Mapping[str, Any]) -> str | None:
        """The field of a row that names another language than the tokenizer's for all rows, as a token of it."""
        sides = (("source_language", self.affixes), ("target_language", self.target_affixes))
        for field, affixes in sides if self.target_affixes else ():
            number = self._special.get(str(row.get(field)))
            if number is not None and affixes and number not in (*affixes[0], *affixes[1]):
                return field
        return None

    @cached_property
    def _special(self) -> dict[str, int]:
        """Added tokens, such as those of languages."""
        return {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def first_tokens(self) -> dict[str, int]:
        """Settings of `generate` that begin a target in its language."""
        return first_tokens(self.target_affixes, self.eos_id)

    @cached_property
    def bytes_of_ids(self) -> Array | None:
        """Bytes of text that each id stands for, int32 [vocabulary]; None where ids do not spell the text out."""
        return bytes_of_ids(json.loads(self.spec.backend))

    def encode_ids(self, texts: Sequence[Any], special: bool = True) -> Tokens:
        """Ids of texts, or of (text, pair) tuples, as arrays: the way to go for many.

        Raises:
            TokenizerDiffers: if the faster library gives other ids than tokenizers.
        """
        if self._fast is None or any(isinstance(text, tuple) for text in texts):
            return self._encode_by_reference(texts, special)
        tokens = self._fast.encode(list(texts), special)
        check_sample(texts, tokens, self._backend, special)
        return tokens

    def _encode_by_reference(self, texts: Sequence[Any], special: bool) -> Tokens:
        if any(isinstance(text, tuple) for text in texts) or (special and self.affixes is None):
            return Tokens.of([encoding.ids for encoding in self.encode(texts, special)])
        tokens = encode_by_reference(self._backend, texts)
        return add_affixes(tokens, *self.affixes) if special and self.affixes else tokens

    def encode(self, texts: Sequence[Any], special: bool = True) -> list[Any]:
        """Encodings of texts, or of (text, pair) tuples, without character offsets."""
        return list(self._backend.encode_batch_fast(list(texts), add_special_tokens=special))

    def encode_with_words(self, texts: Sequence[str]) -> list[tuple[Array, Array]]:
        """Ids of each text, no special tokens around, and the word each belongs to, -1 for none; int32 both."""
        return encode_words(self._backend, texts)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Any]:
        """Encodings of texts that already hold their special tokens, with character offsets."""
        return list(self._backend.encode_batch(list(texts), add_special_tokens=False))

    def truncate(self, text: Any, max_length: int) -> Any:
        """The encoding of one text or pair, cut (longest first) so that special tokens included it fits."""
        self._backend.enable_truncation(max_length, strategy="longest_first")
        try:
            return self._backend.encode(*text) if isinstance(text, tuple) else self._backend.encode(text)
        finally:
            self._backend.no_truncation()

    def encode_words(self, rows: Sequence[Sequence[str]], max_length: int) -> list[tuple[Any, int]]:
        """Encodings of texts given as words, special tokens included, and how many tokens each lost to `max_length`."""
        words = [self._apart(row) for row in rows]
        encodings = list(self._backend.encode_batch(words, is_pretokenized=True))
        lost = [max(len(encoding) - max_length, 0) for encoding in encodings]
        self._backend.enable_truncation(max_length)
        try:
            for place in (place for place, count in enumerate(lost) if count):
                encodings[place] = self._backend.encode(words[place], is_pretokenized=True)
        finally:
            self._backend.no_truncation()
        return list(zip(encodings, lost, strict=True))

    def _apart(self, words: Sequence[str]) -> list[str]:
        """Words as the tokenizer has to get them: many know those within a text by the blank before, as `▁in` or `Ġin`
        are other tokens than `in`."""
        if not self._words_need_blanks:
            return list(words)
        return [word if not place or word.startswith(ASCII_BLANKS) else f" {word}" for place, word in enumerate(words)]

    @cached_property
    def _words_need_blanks(self) -> bool:
        """Whether a word in running text is what the word with a blank before it is, and not what it is by itself."""
        first, within = self._pieces(PROBE), self._pieces(f" {PROBE}")
        return first != within and self._pieces(f"{PROBE} {PROBE}") == first + within

    def _pieces(self, text: str) -> str:
        """A text as the tokenizer's model gets it, piece by piece."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        return "".join(piece for piece, _ in splitter.pre_tokenize_str(text)) if splitter else text

    def encode_windows(self, pairs: Sequence[tuple[str, str]], max_length: int, overlap: int) -> list[list[Any]]:
        """Encodings of (first, second) texts with offsets; a second text too long is cut into overlapping windows.

        Windows share `overlap` tokens of the second text; each holds the first text whole.

        Raises:
            ValueError: where a first text leaves no room for `overlap` + 1 tokens.
        """
        self._backend.enable_truncation(max_length, stride=overlap, strategy="only_second")
        try:
            encodings = self._backend.encode_batch(list(pairs))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ValueError(str(error)) from error
        finally:
            self._backend.no_truncation()
        return [[first, *first.overflowing] for first in encodings]

    @property
    def mask_id(self) -> int:
        """Id of the mask token. Raises JobError where there is none."""
        if self.tokenizer.mask_token_id is None:
            raise JobError("task mlm: the tokenizer has no mask token; choose an encoder such as BERT or RoBERTa")
        return int(self.tokenizer.mask_token_id)

    def render(self, messages: Sequence[dict[str, Any]], **arguments: Any) -> str:
        """A conversation as the model's chat template writes it. Raises DataError where there is no template."""
        if arguments.get("chat_template") is None and self.tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which task sft needs: choose an instruction-tuned model, or give "
                "one in data.chat_template"
            )
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))


def read_spec(folder: str | Path, trust_remote_code: bool = False) -> TokenizerSpec:
    """The tokenizer of a model folder, read with transformers.

    Raises:
        JobError: where the folder holds no fast tokenizer.
    """
    tokenizer = _load_tokenizer(str(folder), trust_remote_code)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(int(value) for value in ids if value is not None)
    target, written = target_affixes(tokenizer), backend.to_str()
    return TokenizerSpec(str(folder), trust_remote_code, written, tokenizer.eos_token_id, pad_id, target)


@lru_cache(maxsize=2)
def load_encoder(folder: str, trust_remote_code: bool = False) -> Encoder:
    return Encoder(read_spec(folder, trust_remote_code))


@lru_cache(maxsize=2)
def encoder_of(spec: TokenizerSpec, fast: bool) -> Encoder:
    return Encoder(spec, fast)


@lru_cache(maxsize=2)
def _load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # 1.6 s: only processes that read a spec or render chats pay it

    if Path(folder).is_dir() and not tokenizer_files(Path(folder)):
        raise JobError(NO_TOKENIZER.format(folder=folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise JobError(f"model.path: no tokenizer can be loaded from {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise JobError(f"model.path: {folder} has only a slow tokenizer; convert it to tokenizer.json first")
    return tokenizer
