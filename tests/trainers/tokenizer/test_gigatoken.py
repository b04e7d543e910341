"""Whatever text comes, the ids are those of the Hugging Face tokenizer; and a difference would be noticed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers.tokenizer.encoder import Encoder, read_spec
from trainers.tokenizer.gigatoken import TokenizerDiffers, check_sample
from trainers.tokenizer.token_arrays import Tokens

ADVERSARIAL = [
    "",
    " ",
    "\n\n\t \r\n",
    "👩‍👩‍👧‍👦🏳️‍🌈 family",
    "e\u0301 vs \u00e9, ﬁ ligature, ａｂｃ wide",
    "日本語のテキスト 中文文本 한국어",
    "العربية עברית हिन्दी ไทย",
    "a" * 20_000,
    " " * 5_000,
    "ab " * 7_000,
    "0123456789" * 300,
    "½ ٣٤٥ Ⅷ ² 1,234.5e-6",
    "\x00\x01\x02\x07\x1b[31m\x7f control",
    "\u0085\u00a0\u2028\u2029\ufeff odd spaces",
    "<|im_start|>user<|im_end|><|endoftext|>",
    "<|im_start|", "<|im_end|><|im_end|>x<|im_end|>",
    "don't I'll WE'RE they'Ve 'tis",
    "\ud7ff\ue000\uf8ff\ufffd\U0010ffff",
    "".join(chr(code) for code in range(1, 0x500)),
    b"\xff\xfe invalid \xc3\x28".decode(errors="replace"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that lacks some bytes, as some published vocabularies do, with a token before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    lacking = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in "ĀāĂ§¶"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=sorted(lacking),
                                  limit_alphabet=251, show_progress=False)  # fmt: skip
    backend.train_from_iterator(["the plot of the film is good, 日本 and don't 123 456"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quick(bpe: Path) -> Encoder:
    encoder = Encoder(read_spec(bpe))
    assert encoder.library == "gigatoken"
    return encoder


@pytest.mark.parametrize("special", [True, False])
def test_adversarial_texts_give_the_hugging_face_ids(quick: Encoder, special: bool) -> None:
    tokens = quick.encode_ids(ADVERSARIAL, special)
    for place, text in enumerate(ADVERSARIAL):
        assert tokens[place].tolist() == quick.tokenizer(text, add_special_tokens=special)["input_ids"], repr(text[:40])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=80), min_size=1, max_size=8))
def test_any_texts_give_the_hugging_face_ids(quick: Encoder, texts: list[str]) -> None:
    tokens = quick.encode_ids(texts)
    assert [tokens[place].tolist() for place in range(len(texts))] == quick.tokenizer(texts)["input_ids"]


def test_bytes_that_the_vocabulary_lacks_are_left_to_tokenizers(quick: Encoder) -> None:
    texts = ["a\x00b the film", "plain", "\x01\x02"]
    exact = Encoder(quick.spec, fast=False)
    assert exact.library == "tokenizers"
    one, other = quick.encode_ids(texts), exact.encode_ids(texts)
    assert np.array_equal(one.ids, other.ids) and np.array_equal(one.offsets, other.offsets)


def test_a_vocabulary_of_whole_words_is_left_to_tokenizers(tiny_tokenizer: Path) -> None:
    encoder = Encoder(read_spec(tiny_tokenizer))
    assert encoder.library == "tokenizers" and encoder.bytes_of_ids is None
    tokens = encoder.encode_ids(["a good film", ("a film", "the plot"), ""])
    assert tokens[1].tolist() == encoder.tokenizer("a film", "the plot")["input_ids"]
    assert tokens[2].tolist() == [2, 3]


@pytest.fixture(scope="module", params=[True, False])
def wordpiece(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzT0123456789.,!'-[]<|>"]
    words += ["##" + char for char in "abcdefghijklmnopqrstuvwxyz0123456789"] + [
        "the",
        "film",
        "##ing",
        "é",
        "日",
        "本",
    ]
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=request.param).save_pretrained(folder)
    encoder = Encoder(read_spec(folder))
    assert encoder.library == "WordPiece cache"
    return encoder


def test_adversarial_texts_give_the_word_pieces_of_hugging_face(wordpiece: Encoder) -> None:
    texts = [*ADVERSARIAL, "[CLS] The [mask] [MASK] film", "FILMING the-film, 3.14!", "x" * 101, "a\tb\nc\x0bd"]
    for special in (True, False):
        tokens = wordpiece.encode_ids(texts, special)
        expected = wordpiece.tokenizer(texts, add_special_tokens=special)["input_ids"]
        assert [tokens[place].tolist() for place in range(len(texts))] == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(max_codepoint=0x17F, exclude_categories=("Cs",))), min_size=1, max_size=6))
def test_any_texts_give_the_word_pieces_of_hugging_face(wordpiece: Encoder, texts: list[str]) -> None:
    tokens = wordpiece.encode_ids(texts)
    assert [tokens[place].tolist() for place in range(len(texts))] == wordpiece.tokenizer(texts)["input_ids"]


def test_ids_that_differ_are_noticed_in_the_batch_that_draws_them(quick: Encoder) -> None:
    text = ["the film is good"]
    right = quick.encode_ids(text)
    wrong = Tokens(right.ids + np.int32(1), right.offsets)
    check_sample(text, right, quick._backend, True)
    with pytest.raises(TokenizerDiffers, match="tokenizers gives"):
        check_sample(text, wrong, quick._backend, True)


def test_every_row_has_its_turn_in_the_sample(quick: Encoder) -> None:
    draw = random.Random(0)
    caught = 0
    for _ in range(300):
        texts = ["good film " * draw.randint(1, 9) for _ in range(4)]
        tokens = quick.encode_ids(texts)
        ids = tokens.ids.copy()
        ids[tokens.offsets[2] : tokens.offsets[3]] += 1
        try:
            check_sample(texts, Tokens(ids, tokens.offsets), quick._backend, True)
        except TokenizerDiffers:
            caught += 1
    assert 40 < caught < 120


def test_ids_spell_out_the_bytes_of_the_text(quick: Encoder) -> None:
    sizes = quick.bytes_of_ids
    assert sizes is not None
    texts = [text for text in ADVERSARIAL if not set(text.encode()) & {0, 1, 2, 0xA7, 0xB6}]
    assert len(texts) > 8
    tokens = quick.encode_ids(texts, special=False)
    spelled = [int(sizes[tokens[place]].sum()) for place in range(len(texts))]
    assert spelled == [len(text.encode()) for text in texts]


def test_an_encoder_is_remade_elsewhere_without_transformers(bpe: Path) -> None:
    import pickle
    import subprocess
    import sys

    spec = read_spec(bpe)
    code = (
        "import sys, pickle\nfrom trainers.tokenizer.encoder import Encoder\n"
        "encoder = Encoder(pickle.loads(sys.stdin.buffer.read()))\n"
        "print(encoder.encode_ids(['the film']).ids.tolist(), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(spec), capture_output=True, check=True)
    expected: Any = Encoder(spec).encode_ids(["the film"]).ids.tolist()
    assert done.stdout.decode().strip() == f"{expected} False"
