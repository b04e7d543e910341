"""A long text taken in slices has the ids that it has in one piece, whatever kind of tokenizer reads it."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.trainers.tokenizer.test_gigatoken import ADVERSARIAL
from trainers.tokenizer import reference as exact_tokenizer
from trainers.tokenizer.reference import encode_by_reference, encode_words, slices

PROSE = "the plot of the film is good, 日本 and don't 123 456\nit's not\tso bad; é"


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([PROSE] * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return backend


def blanks_in_words() -> Tokenizer:
    """Tokens that reach across blanks: what stands anywhere can change how all that follows is cut."""
    backend = Tokenizer(models.BPE())
    backend.train_from_iterator([PROSE * 4] * 3, trainers.BpeTrainer(vocab_size=400))
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([PROSE] * 3, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>"))
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        [PROSE] * 3, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]"])
    )
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return backend


def long_text(seed: int) -> str:
    draw = random.Random(seed)
    words = [*PROSE.split(), *(text[:60] for text in ADVERSARIAL), " ", "\n\n", "x" * 700, "[CLS]"]
    return "".join(draw.choice(words) + draw.choice([" ", " ", " ", "\n", ""]) for _ in range(1500))


@pytest.mark.parametrize(
    ("make", "cut_often"), [(byte_level, True), (unigram, True), (word_piece, True), (blanks_in_words, False)]
)
def test_slices_end_to_end_are_the_whole(
    make: Callable[[], Tokenizer], cut_often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_tokenizer, "SLICE_CHARS", 400)
    backend = make()
    cuts = 0
    for seed in range(12):
        text = long_text(seed)
        expected = backend.encode(text, add_special_tokens=False).ids
        tokens = encode_by_reference(backend, ["the film", text, "a plot"])
        assert tokens[1].tolist() == expected
        assert tokens[2].tolist() == backend.encode("a plot", add_special_tokens=False).ids
        parts = list(slices(backend, text))
        assert "".join(parts) == text
        cuts += len(parts) - 1
    assert cuts > 100 if cut_often else cuts == 0


@pytest.mark.parametrize("make", [byte_level, word_piece])
def test_a_text_without_blanks_is_cut_before_punctuation(
    make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_tokenizer, "SLICE_CHARS", 300)
    backend, text = make(), "日本語です。film,plot;goodactors!" * 60
    parts = list(slices(backend, text))
    assert len(parts) > 3 and "".join(parts) == text
    assert encode_by_reference(backend, [text])[0].tolist() == backend.encode(text, add_special_tokens=False).ids


def test_words_of_slices_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = word_piece()
    texts = ["the film", long_text(1), "", "a plot"]
    whole = [backend.encode(text, add_special_tokens=False) for text in texts]
    monkeypatch.setattr(exact_tokenizer, "SLICE_CHARS", 400)
    for (ids, words), one in zip(encode_words(backend, texts), whole, strict=True):
        assert ids.tolist() == one.ids
        assert words.tolist() == one.word_ids


def test_a_text_without_a_place_to_cut_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_tokenizer, "SLICE_CHARS", 100)
    backend = byte_level()
    for text in ("a" * 1000, "日" * 500, " \n" * 400, ". , " * 200):
        assert list(slices(backend, text)) == [text]
        assert encode_by_reference(backend, [text])[0].tolist() == backend.encode(text).ids


def test_words_cached_slice_by_slice_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from trainers.tokenizer import wordpiece_cache as word_tokenizer
    from trainers.tokenizer.wordpiece_cache import open_wordpiece_cache

    monkeypatch.setattr(word_tokenizer, "SLICE_CHARS", 300)
    monkeypatch.setattr(word_tokenizer, "MOST_PIECES", 50)
    backend = word_piece()
    config: dict[str, Any] = json.loads(backend.to_str())
    words = open_wordpiece_cache(config, backend)
    assert words is not None
    texts = [long_text(seed)[:3000] for seed in range(20)] + [
        "the film is good\u00a0\u2028x " * 90,
        "Straße ΟΔΟΣ ΣΑΣ " * 60,
    ]
    tokens = words.encode(texts)
    for place, text in enumerate(texts):
        assert tokens[place].tolist() == backend.encode(text, add_special_tokens=False).ids, text[:60]
