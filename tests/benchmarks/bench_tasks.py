"""Every task on real data, with the plain Hugging Face Trainer at equal settings beside it.

    python -m tests.benchmarks.bench_tasks --data DIR [--smol FOLDER] [--task ner sft ...] [--seeds 2] [--steps 60]

DIR holds one folder a task. Encoder tasks train MiniLM, the others the model folder given by --smol; the table shows
the untouched model too, where it has a head. Both sides read the same tokenized rows and are scored by the same
evaluation; the Trainer's side (tests/peer.py) computes its own loss and has its own loop, optimizer and schedule. Each
draws order and dropout in its own way, and their first steps differ (ours learns at peak / warm-up steps, the
Trainer's at 0); with --same nothing is left to chance. Ours runs one ZeRO-3 rank, whose time includes its process's
start and its checkpoint. All of it takes about two hours on two cores.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_sentiment import model_path
from tests.peer import train_peer
from tests.ranks import run_ranks
from tests.tiny import shard_locally
from tests.trainers.tasks.test_every_task import export, held_out
from tests.trainers.training.test_training import train_all
from trainers.evaluation.evaluate import evaluate_model
from trainers.job.load import parse_job
from trainers.job.schema import Job

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
               batch=16, steps=180, rate=2e-4),
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
    parser.add_argument("--same", action="store_true", help="the same rows in every step, no dropout, no warm-up")
    parser.add_argument("--smol", type=Path, help="a causal model as safetensors, with a chat template")
    arguments = parser.parse_args()
    for name in arguments.task:
        if SPECS[name].smol and arguments.smol is None:
            print(f"{name} needs --smol FOLDER, so it is left out")
        else:
            measure(name, arguments)


@dataclass(frozen=True)
class Trained:
    """What one side made of a job."""

    path: str
    losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def measure(name: str, arguments: Any) -> None:
    """One data set's table."""
    spec = SPECS[name]
    titles = [f"{name}, {arguments.steps or spec.steps} steps of {spec.batch}", "seed", *spec.shown, "training s"]
    titles += ["largest difference of a step's loss"] if arguments.same else []
    print(f"\n| {' | '.join(titles)} |\n| --- | --- |{' ---: |' * (len(titles) - 2)}", flush=True)
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(name, arguments, seed, Path(folder))
            shard_locally(job)
            task, shards = held_out(job)
            systems: dict[str, Callable[[Job], Trained]] = {
                "untouched": lambda job: Trained(job.model.path),
                "tuneyard": ours,
                "transformers.Trainer": partial(trainers, in_order=arguments.same),
            }
            if task.new_head or seed:
                del systems["untouched"]
            losses: dict[int, float] = {}
            for system, train in systems.items():
                found = train(job)
                metrics = task.metrics(evaluate_model(job, task, found.path, shards)[1])
                cells = [*(f"{metrics[one]:.4f}" for one in spec.shown), f"{found.seconds:.0f}"]
                if arguments.same and losses:
                    cells.append(f"{max(abs(found.losses[step] - losses[step]) for step in losses):.1e}")
                losses = found.losses
                print(f"| {system} | {seed} | {' | '.join(cells)} |", flush=True)


def make_job(name: str, arguments: Any, seed: int, folder: Path) -> Job:
    """The job of a data set."""
    spec, root = SPECS[name], arguments.data.resolve()
    steps = arguments.steps or spec.steps
    data: dict[str, Any] = {"train": [str(root / spec.train)], "max_length": 128, **spec.data}
    held: dict[str, Any] = {"eval_fraction": 0.2}
    if spec.held_out:
        held = {"eval": [first_rows(root / spec.held_out, spec.eval_rows, folder)]}
    model: dict[str, Any] = {"path": str(arguments.smol.resolve() if spec.smol else model_path()), "dtype": "float32"}
    warmup = WARMUP
    if arguments.same:
        model, warmup = {**model, "dropout": 0.0}, 0.0
    return parse_job({
        "name": name, "task": spec.task, "model": model,
        "data": {**data, **held, "max_drop_fraction": 0.05},
        "train": {"global_batch_size": spec.batch, "steps": steps, "learning_rate": arguments.rate or spec.rate,
                  "warmup_ratio": warmup, "schedule": "linear", "seed": seed, "verify": False},
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


def ours(job: Job) -> Trained:
    """Trained by one ZeRO-3 rank."""
    began = time.perf_counter()
    ((losses,),) = run_ranks(train_all, 1, [(job, "run", None)], patience_s=PATIENCE_S)
    seconds = time.perf_counter() - began
    return Trained(export(job), losses, seconds)


def trainers(job: Job, in_order: bool) -> Trained:
    """The same with transformers' Trainer."""
    out = Path(job.storage) / "trainer"
    began = time.perf_counter()
    losses = train_peer(job, out, in_order, os.cpu_count() or 1)
    return Trained(str(out), losses, time.perf_counter() - began)


if __name__ == "__main__":
    main()
