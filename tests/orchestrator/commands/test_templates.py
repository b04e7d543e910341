"""Every template as `tuneyard init` writes it, with its own rows: planned, sharded, trained and evaluated; only the
model is a tiny one and the steps are few."""

from pathlib import Path

import pytest

from orchestrator.commands.init import TEMPLATES, write_job
from orchestrator.training.node_report import free_port
from tests.forked import run_command
from tests.tiny import make_bert, make_llama
from tests.trainers.tasks.small import encoder_decoder, word_tokenizer
from trainers.job.load import load_job
from trainers.tasks import choose_metric

CAUSAL = ("sft", "pretrain")


def tiny_model(folder: Path, task: str, chat_tokenizer: Path) -> Path:
    if task in CAUSAL:
        return make_llama(folder / "model", chat_tokenizer, max_position_embeddings=1024)
    if task == "seq2seq":
        return encoder_decoder(folder / "model", "T5")
    return make_bert(folder / "model", word_tokenizer(folder / "words"), positions=512)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES[1:])
def test_a_template_runs_as_it_is_written(tmp_path: Path, tiny_chat_tokenizer: Path, template: str) -> None:
    job_file = write_job(template, tmp_path / f"{template}.yaml")
    model = tiny_model(tmp_path, load_job(job_file).task, tiny_chat_tokenizer)
    own = ["--set", f"model.path={model}", "--set", "model.gguf_file=null"]
    planned = run_command(["plan", str(job_file), *own], tmp_path)
    assert planned.returncode == 0, planned.stderr
    sharded = run_command(["shard", str(job_file), *own], tmp_path)
    assert sharded.returncode == 0, sharded.stderr
    few = ["train.steps=2", "scale.workers=1", "train.verify=false", "report_to=[tensorboard]"]
    words = [str(job_file), *own, *(word for one in few for word in ("--set", one))]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = run_command(words, tmp_path, "trainers.__main__", **rank, MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training is done: step 2" in done.stdout
    assert f"evaluation of step 2: {choose_metric(load_job(job_file))[0]} " in done.stdout
