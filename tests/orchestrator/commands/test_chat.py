"""`tuneyard chat` with a model whose answers are known: it says AB and then the token that ends its turn."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.tiny import chat_rows, film_rows, make_bert, make_llama, tiny_job
from trainers.errors import JobError
from trainers.evaluation import placement
from trainers.evaluation.conversation import Conversation


def make_talker(folder: Path, tokenizer_folder: Path) -> Path:
    """A Llama that adds nothing in its layers, so that each token decides the next: a line feed A, A B, B the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_llama(folder, tokenizer_folder, tied=False)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    chain = [tokenizer.encode(text)[0] for text in ("\n", "A", "B", "<|im_end|>")]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(itertools.pairwise(chain)):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[following, place] = 10.0
    model.generation_config.eos_token_id = chain[-1]
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Path:
    """A run folder with an export."""
    folder = tmp_path_factory.mktemp("chat")
    job = tiny_job(folder, make_llama(folder / "model", tiny_chat_tokenizer), "sft", chat_rows(10))
    made = folder / "runs" / "tiny-0badcafe"
    made.mkdir(parents=True)
    (made / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    make_talker(made / "export" / "step-00000003", tiny_chat_tokenizer)
    return made


def test_answers_are_streamed_and_end_with_the_trained_token(run: Path) -> None:
    said = CliRunner().invoke(app, ["chat", f"{run}/export/step-00000003"], input="hi\n\n/reset\nagain\n")
    assert said.exit_code == 0, said.exception
    assert said.stdout == "AB\nAB\n"


def test_a_model_that_no_device_holds_is_spread_and_answers_alike(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export = run / "export" / "step-00000003"
    weights = (export / "model.safetensors").stat().st_size
    monkeypatch.setattr(placement, "device_memory", lambda device: {"cpu": weights // 2})
    talk = Conversation(str(export), 20)
    assert "disk" in talk._model.hf_device_map.values() and "and the disk" in caplog.text
    assert talk.answer("hi", lambda _: None) == "AB"


def test_what_was_said_stays_until_it_is_reset(run: Path) -> None:
    talk = Conversation(str(run / "export" / "step-00000003"), 20, system="be brief")
    pieces: list[str] = []
    assert talk.answer("hi", pieces.append) == "AB" == "".join(pieces)
    talk.answer("again", pieces.append)
    assert [one["content"] for one in talk.messages] == ["be brief", "hi", "AB", "again", "AB"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    assert Conversation(str(run / "export" / "step-00000003"), 1).answer("hi", pieces.append) == "A"
    with pytest.raises(JobError, match="the model has room for"):
        talk.answer("hi " * 4000, pieces.append)


def test_a_model_that_does_not_talk_is_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    export: Any = make_bert(tmp_path / "run" / "export" / "step-00000001", tiny_tokenizer)
    done = CliRunner().invoke(app, ["chat", str(export)])
    assert isinstance(done.exception, JobError) and "trained for classify" in str(done.exception)
