"""Tiny models, made on the spot, with the tokenizer folders that the fixtures make."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any


def make_bert(folder: Path, tokenizer: Path, seed: int = 0, dropout: float = 0.1, positions: int = 64) -> Path:
    """A BERT of 2 layers and about 20,000 parameters."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,  # at 0.02 so small a model takes hundreds of steps to leave the start
        pad_token_id=0,
    )
    return _save(BertModel(config), folder, tokenizer)


def make_llama(folder: Path, tokenizer: Path, seed: int = 0, tied: bool = True, **sizes: int) -> Path:
    """A Llama of 2 layers with odd sizes, so that nothing divides by the world size; or with those that are given."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        tie_word_embeddings=tied,
        pad_token_id=0,
        **{
            "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer)),
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 50,
            "max_position_embeddings": 256,
            **sizes,
        },
    )
    return _save(LlamaForCausalLM(config), folder, tokenizer)


def _save(model: Any, folder: Path, tokenizer: Path) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def film_rows(count: int) -> list[dict[str, Any]]:
    """Reviews that a model can tell apart by one word."""
    words = ["the film", "the plot", "the acting", "a film", "a plot"]
    verdicts = [("good", "positive"), ("bad", "negative"), ("not bad", "positive"), ("not good", "negative")]
    rows = []
    for index in range(count):
        verdict, label = verdicts[index % 4]
        subject = words[(index // 4) % 5]
        rows.append({"text": f"{subject} is {'very ' * (index % 3)}{verdict} .", "label": label})
    return rows


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns."""
    rows = []
    for index in range(count):
        messages = [{"role": "system", "content": "the plot"}] if index % 3 == 0 else []
        for turn in range(1 + index % 3):
            messages.append({"role": "user", "content": f"is the film good {turn} {index}"})
            messages.append({"role": "assistant", "content": f"the film is {'good' if index % 2 else 'not good'}"})
        rows.append({"messages": messages})
    return rows


def own_encoder(folder: Path) -> Any:
    """An encoder whose tokenizer may be changed: the one that `Encoder` takes is the whole process's."""
    from trainers.tokenizer.encoder import Encoder, read_spec

    encoder = Encoder(read_spec(folder))
    encoder.__dict__["tokenizer"] = copy.deepcopy(encoder.tokenizer)
    return encoder


def checked(job: Any, model: str | Path | None = None) -> Any:
    """What the data stage gets of a job; of the model a tokenizer is enough. The files are looked at as ever."""
    from orchestrator.planning.preflight import CheckedJob, find_rows
    from trainers.model.source import ModelFolder
    from trainers.shards.keys import plan_splits, split_sources

    path = str(model or job.model.path)
    return CheckedJob(job, ModelFolder(path, ""), plan_splits(job, path, split_sources(job, find_rows)))


def load_written(job: Any, model: str | Path | None = None) -> Any:
    """The committed shards of a job, or None."""
    from trainers.shards.keys import load_shards, plan_splits

    return load_shards(job, plan_splits(job, str(model or job.model.path)))


def shard_locally(job: Any, unit_bytes: int | None = None) -> Any:
    """A job's shards, written in this process as the data stage's tasks would: no Ray, no checks, and no cache."""
    from trainers.shards.keys import gather_shards, manifest_of, plan_splits
    from trainers.shards.manifest import shards_folder, write_manifest
    from trainers.shards.writer import ShardWork, write_unit
    from trainers.sources.readers import plan_units, task_columns
    from trainers.storage import Folder
    from trainers.tasks import encode_rules
    from trainers.tokenizer.encoder import read_spec

    manifests = {}
    for plan in plan_splits(job, job.model.path):
        folder = shards_folder(Folder(job.storage), plan.key)
        rules = encode_rules(job)
        work = ShardWork(folder, plan, job.task, task_columns(job), rules, read_spec(job.model.path))
        records = {unit.index: write_unit(work, unit).commit() for unit in plan_units(plan.sources, unit_bytes)}
        manifests[plan.name] = manifest_of(plan, job.task, records)
        write_manifest(folder, manifests[plan.name])
    return gather_shards(manifests)


def tiny_job(folder: Path, model: Path, task: str, rows: list[dict[str, Any]], **sections: Any) -> Any:
    """A job over `rows`, a fifth of them for evaluation, with its data under `folder`."""
    from trainers.job.load import parse_job

    held_out = max(len(rows) // 5, 1)
    train, held = write_rows(folder / "train.jsonl", rows[held_out:]), write_rows(folder / "dev.jsonl", rows[:held_out])
    raw: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [str(train)], "eval": [str(held)], "max_length": 64},
        "train": {"global_batch_size": 8, "steps": 6, "learning_rate": 1e-3, "warmup_ratio": 0.0},
        "checkpoint": {"every_steps": 3},
        "report_to": ["tensorboard"],
        "storage": str(folder / "storage"),
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return parse_job(raw)
