"""A small evaluation by a warm evaluator, which swaps weights, and by a fresh process: wall and CPU seconds.

    python -m tests.benchmarks.bench_evaluator [--rows 200] [--times 5]

Both score the same two exports in turn, interleaved in one run; medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from orchestrator.evaluation.task import score
from tests.conftest import make_tokenizer
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.tasks.small import with_head
from trainers.evaluation.evaluate import keep_scores
from trainers.run.record import Run, find_run

FRESH = (
    "import sys; from tests.benchmarks.bench_evaluator import evaluate, read; evaluate(*read(sys.argv[1]), sys.argv[2])"
)


def evaluate(run: Run, step: int, path: str) -> None:
    keep_scores(run, run.load_task(), step, [score(run, path, 0)])


def read(file: str) -> tuple[Run, int]:
    return Run.model_validate_json(Path(file).read_text()), 1


def seconds(of: int) -> tuple[float, float]:
    used = getrusage(of)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bert(folder / "model", make_tokenizer(folder / "words"))
        job = tiny_job(folder, model, "classify", film_rows(arguments.rows * 5))
        shard_locally(job)
        run = find_run(job)
        paths = [str(with_head(run, folder / f"export-{number}")) for number in (1, 2)]
        (folder / "run.json").write_text(run.model_dump_json())
        evaluate(run, 1, paths[0])
        spent: dict[str, list[tuple[float, float]]] = {"warm": [], "fresh": []}
        for number in range(arguments.times):
            path = paths[(number + 1) % 2]
            for kind, of in (("warm", RUSAGE_SELF), ("fresh", RUSAGE_CHILDREN)):
                before = seconds(of)
                if kind == "warm":
                    evaluate(run, 1, path)
                else:
                    subprocess.run([sys.executable, "-c", FRESH, str(folder / "run.json"), path], check=True)
                spent[kind].append(tuple(b - a for a, b in zip(before, seconds(of), strict=True)))
    for index, what in enumerate(("wall", "CPU")):
        warm, fresh = (statistics.median(one[index] for one in spent[kind]) for kind in ("warm", "fresh"))
        print(f"{what}: warm {warm:.2f} s, fresh {fresh:.2f} s, {fresh / warm:.1f} times")


if __name__ == "__main__":
    main()
