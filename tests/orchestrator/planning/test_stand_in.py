"""A plan from config.json alone: no weights, and no tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, LlamaConfig, T5Config
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.planning.preflight import check_file
from tests.tiny import chat_rows, write_rows
from trainers.errors import JobError

CONFIGS = {
    "bert": BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "llama": LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "t5": T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
}
TEXT = "eight letters and more, twice eight letters and more"
PAIR = {"sentence1": TEXT, "sentence2": TEXT, "score": 1.0}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("bert", {"text": TEXT, "label": "good"}),
    "tag": ("bert", {"tokens": TEXT.split(), "tags": ["O"] * len(TEXT.split())}),
    "extract": ("bert", {"question": "what?", "context": TEXT, "answers": {"text": ["letters"], "answer_start": [6]}}),
    "similarity": ("bert", PAIR),
    "mlm": ("bert", {"text": TEXT}),
    "seq2seq": ("t5", {"source": TEXT, "target": TEXT}),
    "pretrain": ("llama", {"text": TEXT}),
    "sft": ("llama", chat_rows(1)[0]),
}


def plan(job: Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", str(job), "--json", "--memory", "80GiB"])
    assert done.exception is None, done.exception
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def write_job(folder: Path, task: str) -> Path:
    family, row = TASKS[task]
    CONFIGS[family].save_pretrained(folder / "model")
    rows = [row, {**row, "label": "bad"}] if task == "classify" else [row] * 2
    job = {
        "name": "early", "task": task, "model": {"path": str(folder / "model")}, "storage": str(folder / "s"),
        "data": {"train": [str(write_rows(folder / "rows.jsonl", rows * 20))], "eval_fraction": 0.2, "max_length": 64},
        "train": {"global_batch_size": 8, "steps": 10, "learning_rate": 1e-5},
    }  # fmt: skip
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_planned_without_a_tokenizer(task: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, task)
    told = plan(job)
    assert told["fits"] and told["ways"] and told["parameters"] > 0
    assert not told["exact"] and told["example"] is None and told["steps"] == 10
    assert [note for note in told["notes"] if "no tokenizer" in note and "refuses it" in note]
    assert not (tmp_path / "model" / "tokenizer.json").exists(), "the folder stays as it is"
    with pytest.raises(JobError, match="no safetensors weights"):
        check_file(job)


def test_memory_is_what_it_is_with_the_tokenizer_and_tokens_are_about_right(
    tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    job = write_job(tmp_path, "pretrain")
    early = plan(job)
    for file in tiny_chat_tokenizer.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    late = plan(job)
    assert early["ways"] == late["ways"] and early["micro_batch_size"] == late["micro_batch_size"]
    assert late["exact"] and late["example"] and not any("no tokenizer" in note for note in late["notes"])
    rows = early["train_rows"]
    assert early["train_tokens"] / rows == pytest.approx(len(TEXT) / 4 + 1, rel=0.1), "and the end of the document"
