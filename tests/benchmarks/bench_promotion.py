"""How often a model that is no better than the champion is promoted: A/A pairs through the rule `if_better`.

    python -m tests.benchmarks.bench_promotion [--pairs 400] [--resamples 400] [--only loss,bleu]

Both models are equally good in truth, and agree on some rows as checkpoints of one model do. The rule promotes where
the 95 % interval of the difference lies on the better side of 0, so by luck alone 2.5 % of the pairs; beside the share
stands its own 95 % interval (Wilson). Losses come from a skewed distribution (lognormal), as those of rows do.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.registry.promotion import RowScores, decide
from trainers.tasks import Task, load_task
from trainers.tasks.metrics.entities import entity_counts
from trainers.tasks.metrics.generated_text import overlap_scores, translation_counts

CLASSES, ACCURACY, SHARED = 3, 0.8, 0.6
"""`SHARED`: of this share of rows both say the same."""
WORDS = (
    "the",
    "film",
    "a",
    "plot",
    "is",
    "good",
    "bad",
    "very",
    "long",
    "short",
    "acting",
    "was",
    "seen",
    "by",
    "all",
    "of",
)
TAGS = ("B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "O")
Numbers = dict[str, np.ndarray]
Random = np.random.Generator


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--rows", type=int, nargs="+", default=[40, 150, 1000])
    parser.add_argument("--only", default=",".join(MAKERS))
    arguments = parser.parse_args()
    print("| metric | rows | pairs | promoted | 95 % interval | CPU seconds |\n| --- | --- | --- | --- | --- | --- |")
    for name in arguments.only.split(","):
        task, metric, mode, make = MAKERS[name]
        for rows in arguments.rows:
            began = time.process_time()
            wins = sum(promoted(pair, rows, task(), metric, mode, make, arguments.resamples)
                       for pair in range(arguments.pairs))  # fmt: skip
            low, high = wilson(wins, arguments.pairs)
            print(
                f"| {name} | {rows:,} | {arguments.pairs} | {wins / arguments.pairs:.1%} | {low:.1%} to {high:.1%} "
                f"| {time.process_time() - began:.0f} |",
                flush=True,
            )


def promoted(
    pair: int, rows: int, task: Task, metric: str, mode: str, make: Callable[[Random, int], list[Numbers]], draws: int
) -> bool:
    """Whether the second of two equally good models becomes champion."""
    scores = [RowScores("one", "key", {"row": np.arange(rows), **numbers})
              for numbers in make(np.random.default_rng(pair), rows)]  # fmt: skip
    return decide("if_better", scores[0], scores[1], task, metric, mode, pair, resamples=draws).promote  # type: ignore[arg-type]


def luck(random: Random, rows: int) -> list[np.ndarray]:
    """How lucky each model is with each row, 0 to 1; with the shared rows alike."""
    alike, drawn = random.random(rows) < SHARED, random.random((3, rows))
    return [np.where(alike, drawn[0], own) for own in drawn[1:]]


def classify(random: Random, rows: int) -> list[Numbers]:
    """Classes of 60, 30 and 10 %."""
    label, found = random.choice(CLASSES, rows, p=(0.6, 0.3, 0.1)), []
    for right in luck(random, rows):
        wrong = (label + 1 + (right * 997 % 1 * (CLASSES - 1)).astype(int)) % CLASSES
        found.append(
            {"label": label, "prediction": np.where(right < ACCURACY, label, wrong), "loss_sum": skewed(right)}
        )
    return found


def skewed(right: np.ndarray) -> np.ndarray:
    """Losses from luck: lognormal with sigma 1.5, of which a few rows are most of the sum."""
    from scipy.stats import norm

    return np.exp(1.5 * norm.ppf(np.clip(right, 1e-9, 1 - 1e-9)))


def language(random: Random, rows: int) -> list[Numbers]:
    """Documents of 1 to 400 tokens, each with a mean loss a token of its own."""
    targets = random.integers(1, 400, rows)
    return [{"loss_sum": skewed(right) * targets, "targets": targets, "correct": targets // 2, "bytes": targets * 4}
            for right in luck(random, rows)]  # fmt: skip


def chosen(right: float, wanted: str, others: Sequence[str]) -> str:
    """A tag or a word as a model says it."""
    return wanted if right < ACCURACY else others[int(right * 997) % len(others)]


def tags(random: Random, rows: int) -> list[Numbers]:
    """Sentences of 12 words, of which a few are entities of rare and frequent types."""
    kinds, found = random.choice(7, (rows, 12), p=(0.1, 0.05, 0.03, 0.02, 0.01, 0.01, 0.78)), []
    truth, by_word = [[TAGS[kind] for kind in line] for line in kinds], [luck(random, rows) for _ in range(12)]
    for model in range(2):
        said = [[chosen(by_word[place][model][row], tag, TAGS) for place, tag in enumerate(line)]
                for row, line in enumerate(truth)]  # fmt: skip
        counted = dict.fromkeys(("loss_sum", "targets", "words", "words_right"), np.ones(rows))
        found.append(counted | entity_counts(truth, said, TAGS))
    return found


def texts(random: Random, rows: int) -> list[Numbers]:
    """Targets of 3 to 20 words; what is said differs from them in some words."""
    wanted = [random.choice(WORDS, random.integers(3, 20)).tolist() for _ in range(rows)]
    by_word, found = [luck(random, rows) for _ in range(20)], []
    for model in range(2):
        said = [" ".join(chosen(by_word[place][model][row], word, WORDS) for place, word in enumerate(line))
                for row, line in enumerate(wanted)]  # fmt: skip
        target = [" ".join(line) for line in wanted]
        counted = dict.fromkeys(("loss_sum", "targets", "correct"), np.ones(rows))
        found.append(counted | translation_counts(said, target, "13a") | overlap_scores(said, target))
    return found


def tagger() -> Task:
    """A task that knows its tags."""
    task = load_task("tag")
    task.labels = TAGS
    return task


MAKERS: dict[str, tuple[Callable[[], Task], str, str, Callable[[Random, int], list[Numbers]]]] = {
    "accuracy": (lambda: load_task("classify"), "accuracy", "max", classify),
    "f1_macro": (lambda: load_task("classify"), "f1_macro", "max", classify),
    "loss": (lambda: load_task("classify"), "loss", "min", classify),
    "loss a token": (lambda: load_task("pretrain"), "loss", "min", language),
    "f1 of entities": (tagger, "f1", "max", tags),
    "bleu": (lambda: load_task("seq2seq"), "bleu", "max", texts),
    "rougeL": (lambda: load_task("seq2seq"), "rougeL", "max", texts),
}
"""By what the table calls it: task, metric, mode, and how rows of two models are made."""


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share."""
    share, extra = count / total, z * z / total
    centre, half = share + extra / 2, z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return (centre - half) / (1 + extra), (centre + half) / (1 + extra)


if __name__ == "__main__":
    main()
