"""What successive halving saves on sentiment, and what it misses: the same learning rates as a grid and halved.

    python -m tests.benchmarks.bench_sweep --data DIR      (DIR holds train.jsonl and dev.jsonl)

MiniLM fully fine-tuned with the settings of bench_sentiment.py; learning rates from 1e-6 to 3e-3 by magnitude. Each
sweep has its own storage, so that the second takes nothing from the first. Twelve trials of which three go on from a
pause at a quarter take 12 / 4 + 3 x 3 / 4 of 12 trainings, 44 % of the steps. A trial pauses at a checkpoint. `--rows`,
`--batch`, `--max-length` and `--dtype` make it short, and its outcome noise where the training is. With `--storage` a
benchmark that was killed goes on (its seconds are those of the last command alone), and what it trained stays there.

After the grid comes what other halvings would have made of it: a trial trains bit for bit as in the grid, so its curve
there says what each would have seen and taken, one trial after the other. The last line is a halved sweep of its own.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from orchestrator.sweep.halving import next_stop, next_trial, pause_steps
from orchestrator.sweep.record import SweepRecord
from tests.benchmarks.bench_sentiment import BATCH, MAX_LENGTH, WARMUP_RATIO, WEIGHT_DECAY, model_path, read

LOW, HIGH = 1e-6, 3e-3
REPLAYED = ((4, 1), (6, 1), (3, 1), (3, 2))
"""Halvings and pauses."""


def main() -> None:
    """Run both sweeps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda word: Path(word).resolve(), required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--halving", type=int, default=4)
    parser.add_argument("--pauses", type=int, default=1)
    parser.add_argument("--rows", type=int, help="Training rows; default: all.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpoints", type=int, default=8, help="Of a whole training, each evaluated.")
    parser.add_argument("--storage", type=lambda word: Path(word).resolve(), help="Kept; default: a folder that goes.")
    arguments = parser.parse_args()
    print("| sweep | steps | best dev accuracy | learning rate | seconds |")
    print("| --- | --- | --- | --- | --- |")
    halved = {"halving": arguments.halving, "pauses": arguments.pauses}
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("grid", {}), (f"halving {arguments.halving}, pauses {arguments.pauses}", halved)):
            place = (arguments.storage or Path(folder)) / name.replace(",", "").replace(" ", "-")
            record, seconds = sweep(arguments, place, more)
            tell(name, record, f"{seconds:.0f}")
            for factor, pauses in () if more else REPLAYED:
                played = replay(record, arguments, factor, pauses)
                tell(f"halving {factor}, pauses {pauses}, played on the grid's curves", played, "")


def tell(name: str, record: SweepRecord, seconds: str) -> None:
    """A line of the table."""
    best, steps = record.ranked()[0], sum(trial.step for trial in record.trials)
    found, rate = best.best(record.mode), best.values["train.learning_rate"]
    print(f"| {name} | {steps:,} | {found[1] if found else math.nan:.4f} | {rate:g} | {seconds} |", flush=True)


def replay(grid: SweepRecord, arguments: argparse.Namespace, factor: int, pauses: int) -> SweepRecord:
    """What a halved sweep of the grid's trials comes to, each with the grid's curve as far as it trains."""
    steps = grid.trials[0].steps
    every = math.ceil(steps / arguments.checkpoints)
    stops = pause_steps(steps, every, factor, len(grid.trials), pauses)
    trials = {one.number: one.model_copy(update={"state": "waiting", "step": 0, "pauses": stops, "curve": ()})
              for one in grid.trials}  # fmt: skip
    curves = {trial.number: trial.curve for trial in grid.trials}
    while (number := next_trial(list(trials.values()), (), factor, grid.mode)) is not None:
        stop = next_stop(trials[number])
        end = {"step": stop or steps, "state": "paused" if stop else "trained"}
        seen = tuple(one for one in curves[number] if one[0] <= end["step"])
        trials[number] = trials[number].model_copy(update={**end, "curve": seen})
    return grid.model_copy(update={"trials": tuple(trials.values())})


def sweep(arguments: argparse.Namespace, place: Path, more: dict[str, int]) -> tuple[SweepRecord, float]:
    """The record of a sweep, and seconds."""
    file = write_files(arguments, place, more)
    words = [sys.executable, "-m", "orchestrator", "sweep", str(file), "--json"]
    began = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stdout
    return SweepRecord.model_validate_json(done.stdout), seconds


def write_files(arguments: argparse.Namespace, place: Path, more: dict[str, int]) -> Path:
    """The training rows, the job and the sweep file in a folder; the path of the last."""
    place.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.data / "train.jsonl")[: arguments.rows]
    train = place / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = len(rows) * arguments.epochs / arguments.batch
    job = {
        "name": "sentiment",
        "task": "classify",
        "model": {"path": model_path(), "dtype": arguments.dtype},
        "data": {
            "train": [str(train)],
            "eval": [str(arguments.data / "dev.jsonl")],
            "max_length": arguments.max_length,
        },
        "train": {
            "global_batch_size": arguments.batch,
            "epochs": arguments.epochs,
            "learning_rate": LOW,
            "schedule": "linear",
            "warmup_ratio": WARMUP_RATIO,
            "weight_decay": WEIGHT_DECAY,
        },
        "scale": {"workers": arguments.workers},
        "checkpoint": {"every_steps": math.ceil(steps / arguments.checkpoints), "keep": 1},
        "evaluate": {"metric": "accuracy"},
        "storage": str(place / "storage"),
    }
    path = place / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    rates = [LOW * (HIGH / LOW) ** (number / (arguments.trials - 1)) for number in range(arguments.trials)]
    grid = {"train.learning_rate": [float(f"{rate:.3g}") for rate in rates]}
    file = place / "sweep.yaml"
    file.write_text(yaml.safe_dump({"job": str(path), "method": "grid", "space": grid, **more}), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
