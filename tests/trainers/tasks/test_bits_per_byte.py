"""Bytes of text that tokens stand for, over each kind of vocabulary."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainers.tasks.metrics.bits_per_byte import token_bytes
from trainers.tokenizer.encoder import Encoder, load_encoder

TEXT = "running run é"
BYTES = 14


def make_encoder(folder: Path, model: Any, splitter: Any, decoder: Any) -> Encoder:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = splitter, decoder
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    return load_encoder(str(folder))


def test_word_pieces_stand_for_the_words_without_blanks_and_the_unknown_for_nothing(tmp_path: Path) -> None:
    pieces = {"[UNK]": 0, "run": 1, "##ning": 2, "é": 3}
    model = models.WordPiece(pieces, unk_token="[UNK]")
    encoder = make_encoder(tmp_path, model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    ids = encoder.tokenizer(TEXT + " unheard").input_ids
    assert ids == [1, 2, 1, 3, 0]
    assert int(token_bytes(encoder)[ids].sum()) == BYTES - len("  ")


def test_byte_level_tokens_stand_for_every_byte(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate([*alphabet, "ru"])}, [("r", "u")])
    encoder = make_encoder(tmp_path, model, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    ids = encoder.tokenizer(TEXT).input_ids
    assert len(ids) == BYTES - 2
    assert int(token_bytes(encoder)[ids].sum()) == BYTES


def test_bytes_and_blanks_that_are_written_out_are_one_byte_each(tmp_path: Path) -> None:
    written = {"[UNK]": 0, "\u2581run": 1, "ning": 2, "\u2581": 3, "<0xC3>": 4, "<0xA9>": 5}
    model = models.Unigram([(name, -1.0) for name in written], 0, byte_fallback=True)
    encoder = make_encoder(tmp_path, model, pre_tokenizers.Metaspace(), decoders.ByteFallback())
    ids = encoder.tokenizer(TEXT).input_ids
    assert ids == [1, 2, 1, 3, 4, 5]
    assert int(token_bytes(encoder)[ids].sum()) == BYTES + len(" ")  # a blank is put before the first word
