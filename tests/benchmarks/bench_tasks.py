"""Every task on real data, with the plain Hugging Face Trainer at equal settings beside it.

    python -m tests.benchmarks.bench_tasks --data DIR [--smol FOLDER] [--task ner sft ...] [--seeds 2] [--steps 60]

DIR holds one folder a task. Encoder tasks train MiniLM, the others the model folder given by --smol; the table shows
the untouched model too, where it has a head. Both sides read the same tokenized rows and are judged by the same
evaluation; the Trainer's side computes its own loss and has its own loop, optimizer and schedule. Ours runs one ZeRO-3
rank, whose time includes its process's start and its checkpoint. All of it takes about 100 minutes on two cores.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
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

WARMUP = 0.1
PATIENCE_S = 7200


@dataclass(frozen=True)
class Spec:
    """One data set: the job's task, its files, and how much of it a short run takes."""

    task: str
    train: str
    held_out: str | None
    """None: a fifth of the training rows."""
    shown: tuple[str, ...]
    data: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    eval_rows: int = 0
    """First rows of the evaluation file; 0: all."""
    batch: int = 32
    steps: int = 60
    rate: float = 5e-5
    smol: bool = False


CAUSAL: dict[str, Any] = {"batch": 4, "steps": 24, "smol": True}
SPECS: dict[str, Spec] = {
    "sentiment": Spec("classify", "sentiment/train.jsonl", "sentiment/test.jsonl", ("accuracy", "f1_macro", "auroc"),
                      steps=150),
    "ner": Spec("tag", "ner/train.jsonl", "ner/test.jsonl", ("f1", "strict_f1", "accuracy"), steps=200, rate=2e-4),
    "similarity": Spec("similarity", "similarity/train.jsonl", "similarity/test.jsonl", ("pearson", "spearman"),
                       {"score_range": [0, 5]}, steps=240, rate=2e-4),
    "qa": Spec("extract", "qa/xquad.en.json", None, ("exact", "f1"), {"max_length": 256, "window_overlap": 64},
               batch=16, steps=90, rate=2e-4),
    "mlm": Spec("mlm", "text/train.jsonl", "text/wiki.txt", ("loss", "token_accuracy"), {"overlong": "split"},
                eval_rows=2, steps=20),
    "pretrain": Spec("pretrain", "text/train.jsonl", "text/wiki.txt", ("loss", "bits_per_byte"),
                     {"packing": False, "max_length": 192}, eval_rows=3, **CAUSAL),
    "sft": Spec("sft", "sft/train.jsonl", "sft/dev.jsonl", ("loss", "token_accuracy", "rougeL", "exact_match"),
                {"packing": False, "max_length": 192}, {"generate": {"max_new_tokens": 40}}, **CAUSAL),
    "summarization": Spec("seq2seq", "summarization/train.jsonl", "summarization/test.jsonl",
                          ("loss", "rouge1", "rouge2", "rougeLsum"),
                          {"columns": {"source": "dialogue", "target": "summary"}, "max_length": 256,
                           "prompt": "{source}\n\nSummary:"},
                          {"generate": {"max_new_tokens": 40}}, eval_rows=96, **CAUSAL),
    "translation": Spec("seq2seq", "translation/train.jsonl", "translation/dev.jsonl", ("loss", "bleu", "chrf"),
                        {"columns": {"source": "en", "target": "de"}, "prompt": "English: {source}\nGerman:"},
                        {"generate": {"max_new_tokens": 32}}, eval_rows=96, batch=8, steps=24, smol=True),
}  # fmt: skip


def main() -> None:
    """Run the tasks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", nargs="*", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--steps", type=int, help="in place of the data set's own number")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, help="learning rate, likewise")
    parser.add_argument("--smol", type=Path, help="a causal model as safetensors, with a chat template")
    arguments = parser.parse_args()
    for name in arguments.task:
        if SPECS[name].smol and arguments.smol is None:
            print(f"{name} needs --smol FOLDER, so it is left out")
        else:
            measure(name, arguments)


def measure(name: str, arguments: Any) -> None:
    """One data set's table."""
    spec = SPECS[name]
    print(
        f"\n| {name}, {arguments.steps or spec.steps} steps of {spec.batch} | seed | {' | '.join(spec.shown)} | "
        f"training s |\n| --- | --- |{' ---: |' * (len(spec.shown) + 1)}",
        flush=True,
    )
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(name, arguments, seed, Path(folder))
            shard_locally(job)
            task, shards = held_out(job)
            systems: dict[str, Any] = {"tuneyard": ours, "transformers.Trainer": trainers}
            if not task.new_head and seed == 0:
                systems = {"untouched": lambda job: (job.model.path, 0.0), **systems}
            for system, train in systems.items():
                path, seconds = train(job)
                _, judged = evaluate_model(job, task, path, shards)
                metrics = task.metrics(judged)
                values = " | ".join(f"{metrics[one]:.4f}" for one in spec.shown)
                print(f"| {system} | {seed} | {values} | {seconds:.0f} |", flush=True)


def make_job(name: str, arguments: Any, seed: int, folder: Path) -> Job:
    """The job of a data set."""
    spec, root = SPECS[name], arguments.data.resolve()
    steps = arguments.steps or spec.steps
    data: dict[str, Any] = {"train": [str(root / spec.train)], "max_length": 128, **spec.data}
    held: dict[str, Any] = {"eval_fraction": 0.2}
    if spec.held_out:
        held = {"eval": [first_rows(root / spec.held_out, spec.eval_rows, folder)]}
    return parse_job({
        "name": name, "task": spec.task,
        "model": {"path": str(arguments.smol.resolve() if spec.smol else model_path()), "dtype": "float32"},
        "data": {**data, **held, "max_drop_fraction": 0.05},
        "train": {"global_batch_size": spec.batch, "steps": steps, "learning_rate": arguments.rate or spec.rate,
                  "warmup_ratio": WARMUP, "schedule": "linear", "seed": seed, "verify": False},
        "evaluate": {"batch_size": 32, **spec.evaluate},
        "scale": {"cpus_per_worker": os.cpu_count() or 1}, "checkpoint": {"every_steps": steps},
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
    run_ranks(train_all, 1, [(job, "run", None)], patience_s=PATIENCE_S)
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
