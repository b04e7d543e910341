"""The model's tokenizer, as the data stage uses it: batches in, ids and character offsets out."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainers.errors import DataError, JobError

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


class Encoder:
    """A fast (Rust) tokenizer without padding or truncation of its own.

    Raises:
        JobError: where the folder holds no fast tokenizer.
    """

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer  # 1.6 s: only the processes that tokenize pay it

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise JobError(f"model.path: no tokenizer can be loaded from {folder}: {error}") from error
        if not self.tokenizer.is_fast:
            raise JobError(f"model.path: {folder} has only a slow tokenizer; convert it to tokenizer.json first")
        self._backend = self.tokenizer.backend_tokenizer
        self.is_encoder_decoder = _is_encoder_decoder(Path(folder))
        self._backend.no_padding()
        self._backend.no_truncation()

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token, if there is one."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def pad_id(self) -> int:
        """Id that fills short sequences; never attended to, never a target."""
        for value in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if value is not None:
                return int(value)
        return 0

    def encode(self, texts: Sequence[Any], special: bool = True) -> list[Any]:
        """Encodings of texts, or of (text, pair) tuples, without character offsets."""
        return list(self._backend.encode_batch_fast(list(texts), add_special_tokens=special))

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
        whole = self._backend.encode_batch(list(map(list, rows)), is_pretokenized=True)
        return [
            (one, 0) if len(one) <= max_length else (self._cut_words(words, max_length), len(one) - max_length)
            for one, words in zip(whole, rows, strict=True)
        ]

    def _cut_words(self, words: Sequence[str], max_length: int) -> Any:
        self._backend.enable_truncation(max_length)
        try:
            return self._backend.encode(list(words), is_pretokenized=True)
        finally:
            self._backend.no_truncation()

    def encode_windows(self, pairs: Sequence[tuple[str, str]], max_length: int, overlap: int) -> list[list[Any]]:
        """Encodings of (first, second) texts with offsets; a second text too long is cut into overlapping windows.

        Windows share `overlap` tokens of the second text; each holds the first text whole.

        Raises:
            ValueError: where a first text leaves no room for `overlap` + 1 tokens.
        """
        self._backend.enable_truncation(max_length, stride=overlap, strategy="only_second")
        try:
            found = self._backend.encode_batch(list(pairs))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ValueError(str(error)) from error
        finally:
            self._backend.no_truncation()
        return [[one, *one.overflowing] for one in found]

    def frame(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        bare, whole = self._backend.encode("a", add_special_tokens=False).ids, self._backend.encode("a").ids
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @property
    def mask_id(self) -> int:
        """Id of the mask token. Raises JobError where there is none."""
        if self.tokenizer.mask_token_id is None:
            raise JobError("task mlm: the tokenizer has no mask token; choose an encoder such as BERT or RoBERTa")
        return int(self.tokenizer.mask_token_id)

    def render(self, messages: Sequence[dict[str, Any]], template: str | None = None) -> str:
        """A conversation as a chat template writes it, the model's own by default. Raises DataError where none is."""
        if template is None and self.tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which task sft needs: choose an instruction-tuned model, or give "
                "one in data.chat_template"
            )
        return str(self.tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False))


def _is_encoder_decoder(folder: Path) -> bool:
    """Whether the model beside the tokenizer reads with one part and writes with another."""
    file = folder / "config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("is_encoder_decoder", False))


@lru_cache(maxsize=2)
def load_encoder(folder: str, trust_remote_code: bool = False) -> Encoder:
    """The encoder of a model folder, loaded once a process."""
    return Encoder(folder, trust_remote_code)
