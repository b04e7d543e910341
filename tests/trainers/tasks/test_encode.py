"""What rows become: targets, decoded; drops with their reasons; packed documents that cannot see each other."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import chat_rows, make_llama, own_encoder
from tests.trainers.tasks.small import rows_of
from trainers.job.sections import MaskSection
from trainers.tasks import EncodeRules, Example, encode_rows, load_task
from trainers.tasks.base import IGNORE
from trainers.tasks.encoded import EncodedRow
from trainers.tokenizer.encoder import Encoder, read_spec

RULES = EncodeRules(max_length=256, overlong="truncate")
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
TRIMMING = (
    "{% for message in messages %}[{{ message['role'] | upper }}] {{ message['content'] | trim }}<|im_end|>{% endfor %}"
)
STRIPS_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ content }}<|im_end|>\n{% endfor %}"
)
SHOUTS = "{% for message in messages %}{{ message['content'] | upper }}<|im_end|>{% endfor %}"
HIDES = "{{ messages | map(attribute='content') | join(' / ') }}"


@pytest.fixture
def encoder(tiny_chat_tokenizer: Path) -> Encoder:
    return own_encoder(tiny_chat_tokenizer)


def encode_one(row: dict[str, Any], encoder: Encoder, rules: EncodeRules = RULES, task: str = "sft") -> EncodedRow:
    (encoded,) = rows_of(encode_rows(load_task(task), [row], encoder, rules))
    return encoded


def targets(encoded: EncodedRow, encoder: Encoder) -> list[str]:
    """The text of each span of targets."""
    (sequence,) = encoded.sequences
    spans = sequence.extra["spans"]
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return [encoder.tokenizer.decode(sequence.input_ids[start:end]) for start, end in pairs]


@pytest.mark.parametrize("template", [None, SMOLLM2, TRIMMING, STRIPS_THINKING])
def test_only_what_the_assistant_says_is_a_target(encoder: Encoder, template: str | None) -> None:
    if template:
        encoder.tokenizer.chat_template = template
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "is the film good?"},
        {"role": "assistant", "content": "the film is good"},
        {"role": "user", "content": "the film is good"},
        {"role": "assistant", "content": "so you said: 🎬 naïve"},
    ]
    encoded = encode_one({"messages": messages}, encoder)
    found = [text.lstrip() for text in targets(encoded, encoder)]  # byte-level BPE joins the space before to the word
    assert found == ["the film is good<|im_end|>", "so you said: 🎬 naïve<|im_end|>"]


def test_every_conversation_of_many_decodes_to_its_assistant_turns(encoder: Encoder) -> None:
    for row in chat_rows(40):
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert targets(encode_one(row, encoder), encoder) == [f"{text}<|im_end|>" for text in said]


def test_prompt_and_completion_are_a_conversation(encoder: Encoder) -> None:
    encoded = encode_one({"prompt": "a film?", "completion": "good"}, encoder)
    assert targets(encoded, encoder) == ["good<|im_end|>"]


def test_target_counts_agree_with_the_labels_of_the_batch(encoder: Encoder) -> None:
    import pyarrow as pa

    task = load_task("sft")
    encoded = rows_of(task.encode(chat_rows(12), encoder, RULES))
    sequences = [one.sequences[0] for one in encoded]
    table = pa.table({"spans": pa.array([one.extra["spans"] for one in sequences], pa.list_(pa.int32()))})
    rows = [Example(i, np.array(one.input_ids, dtype=np.int32), one.extra) for i, one in enumerate(sequences)]
    batch = task.collate([rows[:5], rows[5:9], rows[9:]], pad_id=0)
    counted = task.count_targets(table)
    assert batch.segments is not None
    per_document = [int(((batch.segments == i) & (batch.labels != IGNORE)).sum()) for i in range(12)]
    assert per_document == counted.tolist()
    assert batch.tokens == sum(len(one.input_ids) for one in sequences)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing_messages"),
        ({"messages": "hello"}, "messages_not_a_list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content_not_a_string"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_target"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "no_target"),
    ],
)
def test_unusable_conversations_are_dropped_with_the_reason(encoder: Encoder, row: dict[str, Any], reason: str) -> None:
    assert encode_one(row, encoder).outcome == f"dropped:{reason}"


def test_a_template_that_changes_what_is_said_is_followed(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = SHOUTS
    (spoken,) = {
        text for row in chat_rows(4) for text in targets(encode_one(row, encoder), encoder) if "NOT" not in text
    }
    assert spoken == "THE FILM IS GOOD<|im_end|>"


def test_a_template_that_hides_the_turns_is_not_guessed_at(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = HIDES
    assert encode_one(chat_rows(1)[0], encoder).outcome == "dropped:template_hides_the_turns"


def test_a_conversation_cut_before_the_answer_is_dropped_not_trained_on_nothing(encoder: Encoder) -> None:
    messages = [{"role": "user", "content": "film " * 300}, {"role": "assistant", "content": "good"}]
    assert encode_one({"messages": messages}, encoder).outcome == "dropped:no_target"


def test_overlong_policies(encoder: Encoder) -> None:
    row = {"text": "the film is good " * 20}
    whole = encode_one(row, encoder, EncodeRules(10_000, "truncate"), "pretrain")
    length = len(whole.sequences[0].input_ids)
    assert whole.outcome == "kept"
    assert whole.sequences[0].input_ids[-1] == encoder.eos_id
    cut = encode_one(row, encoder, EncodeRules(16, "truncate"), "pretrain")
    assert (cut.outcome, cut.tokens_lost, len(cut.sequences[0].input_ids)) == ("truncated", length - 16, 16)
    split = encode_one(row, encoder, EncodeRules(16, "split"), "pretrain")
    pieces = [list(one.input_ids) for one in split.sequences]
    assert split.outcome == "split"
    assert list(chain(*pieces)) == list(whole.sequences[0].input_ids)
    assert all(2 <= len(piece) <= 16 for piece in pieces)
    assert encode_one(row, encoder, EncodeRules(16, "drop"), "pretrain").outcome == "dropped:overlong"


@pytest.mark.parametrize("length", range(14, 20))
def test_no_window_of_a_split_document_is_without_a_target(length: int) -> None:
    from trainers.tasks.pretrain import _fit
    from trainers.tokenizer.token_arrays import Tokens

    document = Tokens(np.arange(length, dtype=np.int32), np.array([0, length]))
    (encoded,) = rows_of(_fit(document, EncodeRules(8, "split")))
    assert list(chain(*(one.input_ids for one in encoded.sequences))) == list(range(length))
    assert min(len(one.input_ids) for one in encoded.sequences) >= 2


def test_classification_truncates_as_transformers_does(tiny_tokenizer: Path) -> None:
    encoder = Encoder(read_spec(tiny_tokenizer))
    row = {"text": "the film is very good and the plot is good", "text_pair": "the acting is bad", "label": 1}
    encoded = encode_one(row, encoder, EncodeRules(10, "truncate"), "classify")
    expected = encoder.tokenizer(row["text"], row["text_pair"], truncation="longest_first", max_length=10)
    assert list(encoded.sequences[0].input_ids) == expected["input_ids"]
    start = expected["token_type_ids"].index(1) if "token_type_ids" in expected else 0
    assert encoded.sequences[0].extra["pair_start"] in (start, expected["input_ids"].index(3) + 1)
    assert encoded.sequences[0].extra["label"] == "1"
    assert encoded.outcome == "truncated"


def packed_logits(model: Any, first: list[int], second: list[int], task: Any) -> Any:
    """Logits of the second of two documents in one sequence, after a padded neighbour line."""
    import torch

    rows = [
        Example(i, np.array(ids, dtype=np.int32), {"spans": [1, len(ids)]}) for i, ids in enumerate((first, second))
    ]
    batch = task.collate([rows, rows[:1]], pad_id=0)
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    with torch.no_grad():
        return task.forward(model, inputs)[0, len(first) : len(first) + len(second)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(tmp_path: Path, tiny_chat_tokenizer: Path, attention: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    task, second = load_task("sft"), [11, 12, 13, 14]
    one, other = ([5, 6, 7], [50, 60, 70])
    assert packed_logits(model, one, second, task).equal(packed_logits(model, other, second, task))
    with torch.no_grad():
        alone = model(torch.tensor([second])).logits[0]
    assert torch.allclose(packed_logits(model, one, second, task), alone, atol=1e-5)
    task.forward_options = {"use_cache": True}  # what transformers does by default: the documents then see each other
    assert not packed_logits(model, one, second, task).equal(packed_logits(model, other, second, task))


def test_whole_words_are_hidden_together(tmp_path: Path) -> None:
    """With a tokenizer that takes words apart: of a word all tokens are hidden, or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from trainers.tasks.mlm import choose
    from trainers.tasks.options import TaskOptions

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##ed", "film", "##s", "a"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names).save_pretrained(tmp_path)
    options = TaskOptions(mask=MaskSection(whole_words=True, fraction=0.3))
    task = load_task("mlm", options)
    text = "playing a films played films a play playings"
    (encoded,) = rows_of(
        task.encode([{"text": text}], Encoder(read_spec(tmp_path)), EncodeRules(64, "truncate", options))
    )
    words = np.array(encoded.sequences[0].extra["words"])
    assert words.tolist() == [-1, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 7, 7, -1]
    for seed in range(50):
        hidden, targets = choose(words, options, np.random.default_rng(seed))
        assert sorted(hidden) == np.flatnonzero(np.isin(words, words[hidden])).tolist()
        assert len(targets) == round(14 * 0.3) and set(targets) <= set(hidden)


@pytest.mark.parametrize("longest", [64, 9])
def test_a_causal_source_begins_as_a_document_of_pretraining_does(tiny_tokenizer: Path, longest: int) -> None:
    encoder = Encoder(read_spec(tiny_tokenizer))
    encoder.__dict__["affixes"] = ([1], [])
    row = {"source": "the film is good and the plot is bad", "target": "good"}
    encoded = encode_one(row, encoder, EncodeRules(longest, "truncate"), "seq2seq")
    (sequence,) = encoded.sequences
    whole = encoder.encode([row["source"] + "\n"], special=False)[0].ids
    kept = len(sequence.input_ids) - 1
    assert list(sequence.input_ids) == [1, *whole[len(whole) - kept :]]
    assert (kept == len(whole)) == (longest == 64)
    assert len(sequence.input_ids) + len(sequence.extra["target"]) <= longest


def test_what_messages_hold_that_is_not_read_is_counted_by_rows(encoder: Encoder) -> None:
    rows = [
        {"messages": [{**message, "rating": 5, "tone": None} for message in row["messages"]]} for row in chat_rows(3)
    ]
    batch = encode_rows(load_task("sft"), [*rows, *chat_rows(2), {}], encoder, EncodeRules(256, "truncate"))
    assert batch.notes == {"rating in messages, which is not read": 3}
