"""The model's tokenizer, as the data stage uses it: batches in, ids and character offsets out."""

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

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as the model's chat template writes it. Raises DataError where there is no template."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which task sft needs: choose an instruction-tuned model"
            )
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False))


@lru_cache(maxsize=2)
def load_encoder(folder: str, trust_remote_code: bool = False) -> Encoder:
    """The encoder of a model folder, loaded once a process."""
    return Encoder(folder, trust_remote_code)
