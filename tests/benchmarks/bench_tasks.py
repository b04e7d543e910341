"""Every task on real data, with the plain Hugging Face Trainer at equal settings beside it.

    python -m tests.benchmarks.bench_tasks --data DIR --task ner --steps 60 [--smol FOLDER] [--seeds 2]

DIR holds one folder a task. Encoder tasks train MiniLM, the others the model folder given by --smol; the table shows
the untouched model too, where it has a head. Both sides read the same tokenized rows and are judged by the same
evaluation; the Trainer's side computes its own loss and has its own loop, optimizer and schedule. Ours runs one ZeRO-3
rank.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_sentiment import model_path
from tests.ranks import run_ranks
from tests.tiny import shard_locally
from tests.trainers.tasks.test_every_task import export, held_out
from tests.trainers.test_training import train_all
from trainers.evaluate import evaluate_model
from trainers.job import Job
from trainers.job_file import parse_job
from trainers.tasks.base import IGNORE
from trainers.tasks.causal import CausalTask

BATCH, WARMUP = 32, 0.1
SPECS: dict[str, dict[str, Any]] = {
    "ner": {"task": "tag", "files": ("ner/train.jsonl", "ner/test.jsonl"), "shown": ("f1", "strict_f1", "accuracy")},
    "similarity": {"task": "similarity", "files": ("similarity/train.jsonl", "similarity/test.jsonl"),
                   "data": {"score_range": [0, 5]}, "shown": ("pearson", "spearman")},
    "qa": {"task": "extract", "files": ("qa/xquad.en.json", None), "data": {"max_length": 256, "window_overlap": 64},
           "shown": ("exact", "f1")},
    "sentiment": {"task": "classify", "files": ("sentiment/train.jsonl", "sentiment/test.jsonl"),
                  "shown": ("accuracy", "f1_macro", "auroc")},
    "mlm": {"task": "mlm", "files": ("text/train.jsonl", "text/wiki.txt"), "shown": ("loss", "token_accuracy")},
    "pretrain": {"task": "pretrain", "files": ("text/train.jsonl", "text/wiki.txt"), "smol": True,
                 "data": {"packing": False, "max_length": 256}, "shown": ("loss", "bits_per_byte")},
    "sft": {"task": "sft", "files": ("sft/train.jsonl", "sft/dev.jsonl"), "smol": True,
            "data": {"packing": False, "max_length": 256}, "shown": ("loss", "token_accuracy")},
    "summarization": {"task": "seq2seq", "smol": True,
                      "files": ("summarization/train.jsonl", "summarization/test.jsonl"),
                      "data": {"columns": {"source": "dialogue", "target": "summary"}, "max_length": 384,
                               "prompt": "{source}\n\nSummary:"}, "shown": ("loss", "rouge1", "rougeLsum")},
    "translation": {"task": "seq2seq", "files": ("translation/train.jsonl", "translation/dev.jsonl"), "smol": True,
                    "data": {"columns": {"source": "en", "target": "de"}, "prompt": "English: {source}\nGerman:"},
                    "shown": ("loss", "bleu", "chrf")},
}  # fmt: skip


def main() -> None:
    """Run one task and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=list(SPECS), required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--eval-rows", type=int, default=0, help="first rows of the evaluation file; 0: all")
    parser.add_argument("--smol", type=Path)
    arguments = parser.parse_args()
    shown = SPECS[arguments.task]["shown"]
    print(
        f"| {arguments.task}, {arguments.steps} steps of {arguments.batch} | seed | {' | '.join(shown)} | training s |"
    )
    print(f"| --- | --- |{' --- |' * (len(shown) + 1)}")
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(arguments, seed, Path(folder))
            shard_locally(job)
            task, shards = held_out(job)
            systems: dict[str, Any] = {} if task.new_head else {"untouched": lambda job=job: (job.model.path, 0.0)}
            systems |= {"tuneyard": lambda job=job: ours(job), "transformers.Trainer": lambda job=job: trainers(job)}
            for name, system in systems.items():
                path, seconds = system()
                _, judged = evaluate_model(job, task, path, shards)
                metrics = task.metrics(judged)
                values = " | ".join(f"{metrics[one]:.4f}" for one in shown)
                print(f"| {name} | {seed} | {values} | {seconds:.0f} |", flush=True)


def make_job(arguments: Any, seed: int, folder: Path) -> Job:
    """The job of a spec."""
    spec = SPECS[arguments.task]
    train, held = spec["files"]
    model = arguments.smol if spec.get("smol") else Path(model_path())
    assert model is not None, "--smol FOLDER: a causal model as safetensors"
    data: dict[str, Any] = {"train": [str(arguments.data / train)], "max_length": 128, **spec.get("data", {})}
    data |= (
        {"eval": [first_rows(arguments.data / held, arguments.eval_rows, folder)]} if held else {"eval_fraction": 0.2}
    )
    return parse_job({
        "name": arguments.task, "task": spec["task"], "model": {"path": str(model), "dtype": "float32"},
        "data": {**data, "max_drop_fraction": 0.05},
        "train": {"global_batch_size": arguments.batch, "steps": arguments.steps, "learning_rate": arguments.rate,
                  "warmup_ratio": WARMUP, "schedule": "linear", "seed": seed},
        "scale": {"cpus_per_worker": os.cpu_count() or 1}, "checkpoint": {"every_steps": arguments.steps},
        "storage": str(folder / "storage"),
    })  # fmt: skip


def first_rows(path: Path, count: int, folder: Path) -> str:
    """The path itself, or a copy of its first lines."""
    if not count:
        return str(path)
    lines = path.read_text(encoding="utf-8").split("\n")[:count]
    copy = folder / path.name
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(copy)


def ours(job: Job) -> tuple[str, float]:
    """Folder of the trained model, and seconds."""
    began = time.perf_counter()
    run_ranks(train_all, 1, [(job, "run", None)])
    return export(job), time.perf_counter() - began


def trainers(job: Job) -> tuple[str, float]:
    """The same with transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainingArguments

    from trainers.data.dataset import ShardSet
    from trainers.data.keys import load_shards
    from trainers.data.manifest import shards_folder
    from trainers.data.tokenizer import load_encoder
    from trainers.engine import load_options
    from trainers.storage import Folder

    shards, encoder = load_shards(job, job.model.path), load_encoder(job.model.path)
    assert shards is not None
    task, _ = held_out(job)
    task.prepare(encoder)
    rows = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, task)
    torch.manual_seed(job.train.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    model = task.load_model(job.model.path, pad_id=encoder.pad_id, **load_options(job))
    out = Path(job.storage) / "trainer"
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=job.train.global_batch_size, max_steps=job.train.steps or 1,
        learning_rate=job.train.learning_rate, lr_scheduler_type="linear", warmup_steps=WARMUP, seed=job.train.seed,
        weight_decay=job.train.weight_decay, max_grad_norm=1.0, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    def collate(batch: list[Any]) -> dict[str, Any]:
        return {
            name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in theirs(task, batch, encoder).items()
        }

    began = time.perf_counter()
    Trainer(model=model, args=arguments, train_dataset=_Rows(rows), data_collator=collate).train()
    seconds = time.perf_counter() - began
    model.save_pretrained(out / "model")
    encoder.tokenizer.save_pretrained(out / "model")
    return str(out / "model"), seconds


class _Rows:
    """Rows as a map-style data set."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows.row(int(index))


def theirs(task: Any, batch: list[Any], encoder: Any) -> dict[str, Any]:
    """A batch as transformers' models want it: labels not shifted, padding masked."""
    made = task.collate([[row] for row in batch], encoder.pad_id, int(np.random.randint(1, 2**31)))
    if isinstance(task, CausalTask):
        ids = made.inputs["input_ids"]
        labels = np.full_like(ids, IGNORE)
        labels[:, 1:] = made.labels[:, :-1]
        return {"input_ids": ids, "attention_mask": (made.segments >= 0).astype(np.int64), "labels": labels}
    if made.labels.shape == (len(batch), 2) and "answer_tokens" in batch[0].extra:
        return {**made.inputs, "start_positions": made.labels[:, 0], "end_positions": made.labels[:, 1]}
    if "target_ids" not in made.inputs and "target" in batch[0].extra:
        labels = np.full_like(made.labels, IGNORE)
        labels[:, 1:] = made.labels[:, :-1]
        return {**made.inputs, "labels": labels}
    return {**made.inputs, "labels": made.labels}


if __name__ == "__main__":
    main()
