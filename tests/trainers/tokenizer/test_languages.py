"""Tokenizers that name the language of a source and of a target, as `tokenizer(text_target=...)` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import shard_locally, tiny_job
from tests.trainers.checkpoint.test_export import write_checkpoint
from trainers.errors import JobError
from trainers.model.fit import check_fit
from trainers.storage import Folder
from trainers.tasks import EncodeRules, TaskOptions, encode_rows, load_task
from trainers.tokenizer.encoder import load_encoder

FAMILIES = {"mbart": "de_DE", "mbart50": "de_DE", "nllb": "deu_Latn"}
SOURCE, TARGET = "two men", "zwei maenner"


def make_tokenizer(family: str) -> Any:
    import transformers
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as MBART
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50

    special, words = ["<s>", "<pad>", "</s>", "<unk>"], ["▁", "▁two", "▁men", "▁zwei", "▁maenner"]
    if family == "nllb":
        letters = {token: number for number, token in enumerate([*special, *sorted(set("".join(words)))])}
        return transformers.NllbTokenizer(vocab=letters, merges=[], src_lang="eng_Latn", tgt_lang="deu_Latn")
    kind, codes = (
        (transformers.MBartTokenizer, MBART) if family == "mbart" else (transformers.MBart50Tokenizer, MBART50)
    )
    vocabulary = [(token, 0.0) for token in special] + [(word, -1.0) for word in words]
    vocabulary += [(code, 0.0) for code in (*codes, "<mask>")]
    return kind(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")


def make_model(folder: Path, family: str) -> Path:
    """A model of one layer a side, as the family's own classes have it."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = make_tokenizer(family)
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 64, "decoder_start_token_id": 2,
             "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    if family == "nllb":
        model: Any = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**sizes))
    else:
        model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(family), family)


def encoded(folder: Path, row: dict[str, str], longest: int = 64, **options: Any) -> tuple[list[int], list[int]]:
    batch = encode_rows(load_task("seq2seq"), [row], load_encoder(str(folder)),
                        EncodeRules(longest, "truncate", TaskOptions(**options)))  # fmt: skip
    return batch.tokens[0].tolist(), batch.extra["target"][0].as_py()


def test_sources_and_targets_are_those_of_the_tokenizer_also_when_cut(folder: Path) -> None:
    tokenizer = load_encoder(str(folder)).tokenizer
    wanted = tokenizer(SOURCE, text_target=TARGET)
    assert encoded(folder, {"source": SOURCE, "target": TARGET}) == (wanted["input_ids"], wanted["labels"])
    long = {"source": f"{SOURCE} " * 9, "target": f"{TARGET} " * 9}
    cut = tokenizer(long["source"], truncation=True, max_length=8)["input_ids"]
    labels = tokenizer(text_target=long["target"], truncation=True, max_length=7)["input_ids"]
    assert encoded(folder, long, 8, max_target_length=7) == (cut, labels)


def test_the_decoder_reads_and_writes_the_targets_language_first(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    from trainers.checkpoint.export import export_checkpoint

    rows = [{"source": SOURCE, "target": TARGET}] * 10
    job = tiny_job(tmp_path, folder, "seq2seq", rows)
    encoder, task = load_encoder(str(folder)), load_task("seq2seq", TaskOptions(max_target_length=8))
    language = encoder.tokenizer.convert_tokens_to_ids(FAMILIES[family])
    place = 0 if family == "mbart" else 1
    task.prepare(encoder)
    from trainers.run.record import find_run

    shard_locally(job)
    batch = [find_run(job).open_shards("train", task).row(0)]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = task.collate([batch], encoder.pad_id).to("cpu")[0]
    read: list[Any] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, given, named: read.append(named["input_ids"]), with_kwargs=True
    )
    task.outputs(model, inputs)
    hook.remove()
    assert int(read[0][0, place]) == language
    said: list[Any] = []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: said.append(plain(**given)) or said[-1])
    task.generate(model, batch, encoder.pad_id)
    assert int(said[0][0, place]) == language
    write_checkpoint(Folder(str(tmp_path / "checkpoint")), model)
    out = tmp_path / "export"
    export_checkpoint(Folder(str(tmp_path / "checkpoint")), Folder(str(out)), job, task, job.model.path)
    exported = AutoModelForSeq2SeqLM.from_pretrained(out)
    asked = encoder.tokenizer(SOURCE, return_tensors="pt")
    assert int(exported.generate(**asked, max_new_tokens=4)[0, place]) == language


def test_a_row_in_another_language_than_the_tokenizers_is_dropped(family: str, folder: Path) -> None:
    row, other = {"source": SOURCE, "target": TARGET}, "fra_Latn" if family == "nllb" else "fr_XX"
    own = {"source_language": "English", "target_language": FAMILIES[family]}
    rows = [row, row | own, row | {"target_language": other}, row | {"source_language": other}]
    batch = encode_rows(load_task("seq2seq"), rows, load_encoder(str(folder)), EncodeRules(64, "truncate"))
    said = [batch.outcomes[code] for code in batch.codes]
    assert said[:2] == ["kept"] * 2
    assert said[2:] == [f"dropped:{side}_language_is_not_that_of_the_tokenizer" for side in ("target", "source")]


@pytest.mark.parametrize("lacking", ["src_lang", "tgt_lang"])
def test_a_tokenizer_that_does_not_name_a_language_is_refused_for_targets_alone(lacking: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "nllb")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, lacking: None}))
    row = {"source": SOURCE, "target": TARGET}
    said = f'tokenizer_config.json has no {lacking}: add it, such as "{lacking}": "'
    with pytest.raises(JobError, match=said):
        check_fit(tiny_job(tmp_path, folder, "seq2seq", [row] * 10), str(folder))
    with pytest.raises(JobError, match=said):
        encoded(folder, row)
    check_fit(tiny_job(tmp_path, folder, "classify", [{"text": SOURCE, "label": "a"}] * 10), str(folder))
