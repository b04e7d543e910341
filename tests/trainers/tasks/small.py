"""Tiny jobs of every task, with data that a tiny model can learn in seconds."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from tests.tiny import _save, make_bert, make_llama, shard_locally, tiny_job, write_rows
from trainers.tasks.encoded import EncodedRow, TokenSequence
from trainers.tokenizer.token_arrays import EncodedBatch


def rows_of(batch: EncodedBatch) -> list[EncodedRow]:
    """One record a row, out of a batch."""
    sequences: list[list[TokenSequence]] = [[] for _ in batch.codes]
    for index, row in enumerate(batch.row.tolist()):
        extra = {name: values[index].as_py() for name, values in batch.extra.items()}
        sequences[row].append(TokenSequence(batch.tokens[index].tolist(), extra))
    return [
        EncodedRow(batch.outcomes[code], tuple(own), int(lost))
        for code, own, lost in zip(batch.codes, sequences, batch.tokens_lost, strict=True)
    ]


TEXT = """ada alan grace paris rome oslo met saw in was who where the a very good bad old film plot . ?
dog cat ran sat one two red blue is not user assistant : """
WORDS = tuple(TEXT.split())
PEOPLE, PLACES = WORDS[:3], WORDS[3:6]


def word_tokenizer(folder: Path, causal: bool = False) -> Path:
    """One token a word; with [CLS] and [SEP] around texts, or nothing around them for causal models."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    if causal:
        names["eos_token"] = "[SEP]"
    else:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def chat_tokenizer(folder: Path) -> Path:
    """One token a word, and a chat template."""
    word_tokenizer(folder, causal=True)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return folder


def target_tokenizer(folder: Path) -> Path:
    """As T5 has it: a text and then its end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path, kind: str) -> Path:
    """A T5, BART or Marian of one layer a side."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = len(WORDS) + 3
    common = {"vocab_size": size, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
    bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "bos_token_id": 1,
            "decoder_start_token_id": 1, "forced_eos_token_id": 1, "dropout": 0.0}  # fmt: skip
    config: Any = {
        "T5": lambda: transformers.T5Config(
            **common, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0,
            dropout_rate=0.0),
        "Bart": lambda: transformers.BartConfig(**common, **bart),
        "Marian": lambda: transformers.MarianConfig(**common, **{**bart, "decoder_start_token_id": 0}),
    }[kind]()  # fmt: skip
    heads = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}
    return _save(getattr(transformers, heads[kind])(config), folder, target_tokenizer(folder.parent / "words"))


def draws(count: int) -> list[random.Random]:
    return [random.Random(index) for index in range(count)]


def tag_rows(count: int, ends: bool = False) -> list[dict[str, Any]]:
    """People and places; with `ends` in BIOES, where every name is one word or two."""
    rows = []
    for draw in draws(count):
        person, place = draw.choice(PEOPLE), draw.choice(PLACES)
        one = ["S-per"] if ends else ["B-per"]
        two = ["B-loc", "E-loc"] if ends else ["B-loc", "I-loc"]
        rows.append({"tokens": [person, "was", "in", place, "one", "."], "tags": [*one, "O", "O", *two, "O"]})
    return rows


def question_rows(count: int, unanswerable: bool = False) -> list[dict[str, Any]]:
    rows = []
    for index, draw in enumerate(draws(count)):
        person, place = draw.choice(PEOPLE), draw.choice(PLACES)
        filler = " ".join(draw.choice(("the", "a", "very", "old")) for _ in range(draw.randrange(4)))
        context = f"{filler} {person} was in {place} .".strip()
        question, answers = "who was ?", [{"text": person, "answer_start": context.index(person)}]
        if unanswerable and index % 3 == 0:
            context, answers = f"{filler} dog ran .".strip(), []
        rows.append({"question": question, "context": context, "answers": answers})
    return rows


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Alike where both speak of the same animal."""
    rows = []
    for draw in draws(count):
        first, second = draw.choice(("dog", "cat")), draw.choice(("dog", "cat"))
        verbs = [draw.choice(("ran", "sat")) for _ in range(2)]
        score = 5.0 * (0.8 * (first == second) + 0.2 * (verbs[0] == verbs[1]))
        rows.append({"sentence1": f"the {first} {verbs[0]}", "sentence2": f"a {second} {verbs[1]}", "score": score})
    return rows


def graded_rows(count: int) -> list[dict[str, Any]]:
    """The score counts good words in the second sentence."""
    rows = []
    for draw in draws(count):
        words = [draw.choice(("good", "bad")) for _ in range(3)]
        rows.append({"sentence1": "the film", "sentence2": " ".join(words), "score": words.count("good") * 5 / 3})
    return rows


def echo_rows(count: int) -> list[dict[str, Any]]:
    """The target says the source's words, colours and animals exchanged."""
    swap = {"dog": "cat", "cat": "dog", "red": "blue", "blue": "red", "one": "two", "two": "one"}
    rows = []
    for draw in draws(count):
        words = [draw.choice(("dog", "cat")), draw.choice(("red", "blue")), draw.choice(("one", "two"))]
        rows.append({"source": " ".join(words), "target": " ".join(swap[word] for word in words)})
    return rows


def language_rows(count: int) -> list[dict[str, Any]]:
    """Two languages with words of their own for dog and cat."""
    words = {"ada": {"dog": "red", "cat": "blue"}, "paris": {"dog": "one", "cat": "two"}}
    rows = []
    for place, draw in enumerate(draws(count)):
        source, language = draw.choice(("dog", "cat")), ("ada", "paris")[place % 2]
        rows.append({"source": source, "target": words[language][source], "lang": language})
    return rows


def verdict_rows(count: int) -> list[dict[str, Any]]:
    """The answer depends on the film."""
    rows = []
    for draw in draws(count):
        word = draw.choice(("dog", "cat"))
        answer = "the film is good ." if word == "dog" else "a film is not good ."
        said = [{"role": "user", "content": f"was the {word} film good ?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": said})
    return rows


def several_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for draw in draws(count):
        words = [draw.choice(("dog", "film", "rome")) for _ in range(2)]
        rows.append({"text": f"the {words[0]} {words[1]} .", "label": sorted(set(words))})
    return rows


def plain_rows(count: int) -> list[dict[str, Any]]:
    """Texts in which each word follows from the one before."""
    parts = ("the old dog ran .", "a red cat sat .", "ada was in rome .", "alan was in oslo .")
    return [{"text": " ".join(draw.choice(parts) for _ in range(3))} for draw in draws(count)]


def bert(folder: Path, dropout: float = 0.0) -> Path:
    return make_bert(folder / "model", word_tokenizer(folder / "words"), dropout=dropout)


def llama(folder: Path) -> Path:
    return make_llama(folder / "model", word_tokenizer(folder / "words", causal=True))


def small_jobs(folder: Path) -> dict[str, Any]:
    """A job for every task and mode, sharded; with no more steps than learning the rows takes, since each is 0.1 s of
    two ranks of ZeRO-3."""

    def job(name: str, task: str, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Any:
        train = {"steps": 24, "learning_rate": 5e-3, "global_batch_size": 16, **sections.pop("train", {})}
        data = {"max_length": 32, **sections.pop("data", {})}
        checkpoint = {"every_steps": 100, "keep": 1}
        made = tiny_job(folder / name, model, task, rows, train=train, data=data, checkpoint=checkpoint, **sections)
        shard_locally(made)
        return made

    encoder, decoder = bert(folder / "bert"), llama(folder / "llama")
    talker = make_llama(folder / "talker" / "model", chat_tokenizer(folder / "talker" / "words"))
    scores = {"score_range": [0, 5]}
    faster = {"learning_rate": 8e-3}
    short, middle, long, longer = ({"steps": steps, **faster} for steps in (20, 32, 48, 60))
    windows = {"max_length": 10, "window_overlap": 2}
    first_words = [{"text": row["source"], "label": row["source"][:3]} for row in echo_rows(120)]

    def translator(kind: str) -> Any:
        model = encoder_decoder(folder / kind / "model", kind)
        return job(f"{kind}-job", "seq2seq", model, echo_rows(160), train=middle if kind == "T5" else longer)

    return {
        "mlm": job("mlm", "mlm", encoder, plain_rows(120), train={"steps": 40}),
        "mlm whole words": job("words", "mlm", encoder, plain_rows(60), train={"mask": {"whole_words": True}}),
        "pretrain": job("pretrain", "pretrain", decoder, plain_rows(120)),
        "sft": job(
            "sft", "sft", talker, verdict_rows(160), train=long, data={"packing": True, "max_length": 64},
            evaluate={"generate": {"max_new_tokens": 8}},
        ),
        "tag": job("tag", "tag", encoder, tag_rows(120), train=short),
        "tag BIOES": job("ends", "tag", encoder, tag_rows(60, ends=True), train=short),
        "extract": job("extract", "extract", encoder, question_rows(160), data=windows, train=faster),
        "extract v2": job("extract2", "extract", encoder, question_rows(160, True), train=faster),
        "regression": job("regression", "similarity", encoder, graded_rows(160), data=scores, train=middle),
        "cosine": job("cosine", "similarity", encoder, pair_rows(160), data=scores, train={"objective": "cosine"}),
        "contrastive": job(
            "contrastive", "similarity", encoder, pair_rows(160), data=scores, train={"objective": "contrastive"}
        ),
        "several": job(
            "several", "classify", encoder, several_rows(120), data={"multi_label": True}, train={"steps": 40}
        ),
        "classify causal": job("causal", "classify", decoder, first_words, train=short),
        "T5": translator("T5"),
        "Bart": translator("Bart"),
        "Marian": translator("Marian"),
        "seq2seq causal": job(
            "prompted", "seq2seq", decoder, language_rows(160),
            data={"prompt": "{target_language} : {source} ?", "columns": {"target_language": "lang"}}, train=long,
            evaluate={"generate": {"max_new_tokens": 6, "num_beams": 2}},
        ),
    }  # fmt: skip


SAME_AS_TRAINER = (
    "mlm", "mlm whole words", "pretrain", "sft", "tag", "tag BIOES", "extract", "extract v2", "regression", "several",
    "classify causal", "T5", "Bart", "Marian", "seq2seq causal",
)  # fmt: skip
"""Jobs whose loss transformers' model classes know too: all but those that compare embeddings."""

__all__ = ["small_jobs", "write_rows"]


def with_head(run: Any, folder: Path) -> Path:
    """The pretrained model with a head, as an export has it."""
    import torch

    torch.manual_seed(0)
    task, source = run.load_task(), Path(run.job.model.path)
    task.load_model(str(source), pad_id=0, trust_remote_code=False, dtype=torch.float32).save_pretrained(folder)
    for file in source.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder
