"""What successive halving saves on sentiment, and what it misses: the same learning rates as a grid and halved.

    python -m tests.benchmarks.bench_sweep --data DIR      (DIR holds train.jsonl and dev.jsonl)

MiniLM fully fine-tuned with the settings of bench_sentiment.py; learning rates from 1e-6 to 3e-3 by magnitude. Each
sweep has its own storage, so that the second takes nothing from the first. Twelve trials of which three go on from a
pause at a quarter take 12 / 4 + 3 x 3 / 4 of 12 trainings, 44 % of the steps. A trial pauses at a checkpoint: every
eighth of the steps is one. `--rows` makes it short, and its outcome noise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.benchmarks.bench_sentiment import BATCH, MAX_LENGTH, WARMUP_RATIO, WEIGHT_DECAY, model_path, read

LOW, HIGH, CHECKPOINTS = 1e-6, 3e-3, 8


def main() -> None:
    """Run both sweeps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda word: Path(word).resolve(), required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--halving", type=int, default=4)
    parser.add_argument("--pauses", type=int, default=1)
    parser.add_argument("--rows", type=int, help="Training rows; default: all.")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print("| sweep | steps | best dev accuracy | learning rate | seconds |")
    print("| --- | --- | --- | --- | --- |")
    halved = {"halving": arguments.halving, "pauses": arguments.pauses}
    for name, more in (("grid", {}), (f"halving {arguments.halving}, pauses {arguments.pauses}", halved)):
        steps, accuracy, rate, seconds = sweep(arguments, more)
        print(f"| {name} | {steps:,} | {accuracy:.4f} | {rate:g} | {seconds:.0f} |", flush=True)


def sweep(arguments: argparse.Namespace, more: dict[str, int]) -> tuple[int, float, float, float]:
    """Steps of all trials, the best accuracy with its learning rate, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        rows = read(arguments.data / "train.jsonl")[: arguments.rows]
        train = Path(folder, "train.jsonl")
        train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        job = {
            "name": "sentiment",
            "task": "classify",
            "model": {"path": model_path(), "dtype": "float32"},
            "data": {"train": [str(train)], "eval": [str(arguments.data / "dev.jsonl")], "max_length": MAX_LENGTH},
            "train": {
                "global_batch_size": BATCH,
                "epochs": arguments.epochs,
                "learning_rate": LOW,
                "schedule": "linear",
                "warmup_ratio": WARMUP_RATIO,
                "weight_decay": WEIGHT_DECAY,
            },
            "scale": {"workers": arguments.workers},
            "checkpoint": {"every_steps": -(-len(rows) * arguments.epochs // (BATCH * CHECKPOINTS)), "keep": 1},
            "evaluate": {"metric": "accuracy"},
            "storage": f"{folder}/storage",
        }
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        rates = [LOW * (HIGH / LOW) ** (number / (arguments.trials - 1)) for number in range(arguments.trials)]
        grid = {"train.learning_rate": [float(f"{rate:.3g}") for rate in rates]}
        file = Path(folder, "sweep.yaml")
        file.write_text(yaml.safe_dump({"job": str(path), "method": "grid", "space": grid, **more}), encoding="utf-8")
        words = [sys.executable, "-m", "orchestrator", "sweep", str(file), "--json"]
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads(done.stdout)
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"])
    accuracy = max(value for _, value in best["curve"])
    steps = sum(trial["step"] for trial in record["trials"])
    return steps, accuracy, best["values"]["train.learning_rate"], seconds


if __name__ == "__main__":
    main()
