"""What a model cannot take is known before it is launched: too many positions, ids without an embedding."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from transformers import BartConfig, BartForConditionalGeneration, RobertaConfig, RobertaModel

from tests.tiny import film_rows, make_bert, make_llama, tiny_job
from trainers.errors import JobError
from trainers.model.fit import check_fit, count_parameters, tensor_shapes
from trainers.model.source import find_model


def fitted(folder: Path, model: Path, task: str = "classify", **data: Any) -> list[str]:
    job = tiny_job(folder, model, task, film_rows(10))
    return check_fit(job.model_copy(update={"data": job.data.model_copy(update=data)}), str(model))


def changed(model: Path, folder: Path, **config: Any) -> Path:
    copytree(model, folder)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **config}))
    return folder


def save(model: Any, folder: Path, tokenizer: Path) -> Path:
    copytree(tokenizer, folder)
    model.save_pretrained(folder)
    return folder


def test_learned_positions_bound_the_length(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "bert", tiny_tokenizer)
    assert fitted(tmp_path, model, max_length=64) == []
    with pytest.raises(JobError, match=r"data\.max_length: 65 tokens are more than the 64 positions"):
        fitted(tmp_path, model, max_length=65)


def test_a_second_copy_of_the_weights_under_their_maker_s_names_does_not_count(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    model = make_bert(tmp_path / "bert", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", film_rows(10))
    before, digest = count_parameters(tensor_shapes(model)), find_model(job)
    (model / "consolidated.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes().replace(b"bert", b"brt_")
    )
    assert count_parameters(tensor_shapes(model)) == before
    assert find_model(job) == digest


def test_roberta_counts_its_positions_from_the_padding_on(tmp_path: Path, tiny_tokenizer: Path) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=66, pad_token_id=1, **sizes)
    model = save(RobertaModel(config), tmp_path / "roberta", tiny_tokenizer)
    assert fitted(tmp_path, model, max_length=64) == []
    with pytest.raises(JobError, match="than the 64 positions"):
        fitted(tmp_path, model, max_length=65)


def test_targets_have_positions_too(tmp_path: Path, tiny_tokenizer: Path) -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, **heads}
    config = BartConfig(vocab_size=400, max_position_embeddings=64, **sizes)
    model = save(BartForConditionalGeneration(config), tmp_path / "bart", tiny_tokenizer)
    assert fitted(tmp_path, model, "seq2seq", max_length=64, max_target_length=64) == []
    with pytest.raises(JobError, match=r"data\.max_target_length: 65 tokens are more than the 64"):
        fitted(tmp_path, model, "seq2seq", max_length=64, max_target_length=65)


def test_rotary_positions_go_on_and_that_is_said(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "llama", tiny_tokenizer)
    assert fitted(tmp_path, model, max_length=256) == []
    (note,) = fitted(tmp_path, model, max_length=300)
    assert "data.max_length 300 is past the 256 positions" in note
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    longer = changed(model, tmp_path / "yarn", rope_parameters=scaled)
    assert fitted(tmp_path, longer, max_length=200) == [
        "positions past 64 come from the model's rope scaling (yarn by 4)"
    ]
    assert fitted(tmp_path, longer, max_length=64) == []


def test_every_id_of_the_tokenizer_has_an_embedding(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "bert", tiny_tokenizer)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    rows = max(tokenizer["model"]["vocab"].values()) + 1
    (model / "tokenizer.json").write_text(json.dumps(with_token(tokenizer, "<image>", rows, special=False)))
    assert fitted(tmp_path, model) == ["rows that hold '<image>' would fail: the model has no embedding for it"]
    tokenizer["model"]["vocab"]["novel"] = rows
    other = changed(model, tmp_path / "other")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(JobError, match=f"gives ids up to {rows}, but the model has only {rows} embeddings.*'novel'"):
        fitted(tmp_path, other)


def test_tokens_of_the_chat_template_need_embeddings(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    """Added for a template, without new rows in the model; that they are no special tokens saves nothing."""
    model = make_llama(tmp_path / "llama", tiny_chat_tokenizer)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "tokenizer.json").write_text(json.dumps(with_token(tokenizer, "<|turn|>", rows, special=False)))
    assert len(fitted(tmp_path, model, "sft")) == len(fitted(tmp_path, model, "pretrain")) == 1
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    with pytest.raises(
        JobError, match=rf"gives ids up to {rows}, but the model has only {rows} embeddings.*'<|turn|>'"
    ):
        fitted(tmp_path, model, "sft", chat_template=template)


def with_token(tokenizer: dict[str, Any], text: str, index: int, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], {"id": index, "content": text, **flags}]}
