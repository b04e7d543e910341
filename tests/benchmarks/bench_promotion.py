"""How often a model that is no better than the champion is promoted: A/A pairs through the rule `if_better`.

    python -m tests.benchmarks.bench_promotion [--pairs 400] [--resamples 400]

Both classifiers are right on the same share of rows in truth, and agree on some rows as checkpoints of one model do.
The rule promotes where the 95 % interval of the difference lies above 0, so by luck alone 2.5 % of the pairs; beside
the share stands its own 95 % interval (Wilson).
"""

import argparse
import math
import time

import numpy as np

from orchestrator.registry.promotion import RowScores, decide
from trainers.tasks import load_task

CLASSES, ACCURACY, SHARED = 3, 0.8, 0.6
"""`SHARED`: of this share of rows both say the same."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=400)
    arguments = parser.parse_args()
    print("| metric | rows | pairs | promoted | 95 % interval | CPU seconds |\n| --- | --- | --- | --- | --- | --- |")
    for metric, mode in (("accuracy", "max"), ("f1_macro", "max"), ("loss", "min")):
        for rows in (150, 1000):
            began = time.process_time()
            wins = sum(promoted(pair, rows, metric, mode, arguments.resamples) for pair in range(arguments.pairs))
            low, high = wilson(wins, arguments.pairs)
            print(
                f"| {metric} | {rows:,} | {arguments.pairs} | {wins / arguments.pairs:.1%} | {low:.1%} to {high:.1%} "
                f"| {time.process_time() - began:.0f} |",
                flush=True,
            )


def promoted(pair: int, rows: int, metric: str, mode: str, resamples: int) -> bool:
    """Whether the second of two equally good models becomes champion."""
    random = np.random.default_rng(pair)
    label = random.integers(0, CLASSES, rows)
    alike, luck = random.random(rows) < SHARED, random.random((3, rows))
    scores = []
    for own in luck[1:]:
        right = np.where(alike, luck[0], own)
        wrong = (label + 1 + (right * 997 % 1 * (CLASSES - 1)).astype(int)) % CLASSES
        prediction = np.where(right < ACCURACY, label, wrong)
        numbers = {"row": np.arange(rows), "label": label, "prediction": prediction, "loss_sum": right}
        scores.append(RowScores("one", "key", numbers))
    task = load_task("classify")
    return decide("if_better", scores[0], scores[1], task, metric, mode, pair, resamples=resamples).promote  # type: ignore[arg-type]


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share."""
    share, extra = count / total, z * z / total
    centre, half = share + extra / 2, z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return (centre - half) / (1 + extra), (centre + half) / (1 + extra)


if __name__ == "__main__":
    main()
