"""Peak resident memory of an evaluation, from 1,000 to 100,000 rows: model, forward passes, metrics and their record.

python tests/benchmarks/bench_metric_memory.py [--rows 1000 10000 100000] [--task classify tag pretrain seq2seq]

Each figure is a whole process's (VmHWM), with tiny models, so that what grows with the rows shows.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
TASKS = ("classify", "tag", "pretrain", "seq2seq")


def write_job(task: str, rows: int, folder: Path) -> Any:
    from tests.trainers.tasks import small

    kinds: dict[str, tuple[Any, Any]] = {
        "classify": (small.bert, [{"text": row["text"], "label": "ab"[i % 2]} for i, row in
                                  enumerate(small.plain_rows(200))]),
        "tag": (small.bert, small.tag_rows(200)),
        "pretrain": (small.llama, small.plain_rows(200)),
        "seq2seq": (lambda place: small.encoder_decoder(place, "T5"), small.echo_rows(200)),
    }  # fmt: skip
    make, some = kinds[task]
    repeated = (some * (rows // len(some) + 1))[:rows]
    # a fifth of the rows is held out
    job = small.tiny_job(
        folder, make(folder / "model"), task, repeated * 5, data={"packing": False} if task == "pretrain" else {},
        evaluate={"batch_size": 64, **({"generate": {"max_new_tokens": 4}} if task == "seq2seq" else {})},
    )  # fmt: skip
    small.shard_locally(job)
    return job


def evaluate(job_file: str, run: str) -> None:
    """In a process of its own: score, compute metrics, write the record, and say how much memory it took."""
    from tests.trainers.tasks.test_every_task import held_out
    from trainers.evaluation.evaluate import evaluate_model
    from trainers.job.schema import Job
    from trainers.run.row_scores import write_row_scores
    from trainers.storage import Folder

    job = Job.model_validate_json(Path(job_file).read_text())
    task, shards = held_out(job)
    rows, row_scores = evaluate_model(job, task, job.model.path, shards)
    task.metrics(row_scores)
    write_row_scores(Folder(run), 1, rows, row_scores, task.labels)
    held = sum(values.nbytes for values in row_scores.values())
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(len(rows), int(peak) / 1024, held / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--evaluate", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate:
        return evaluate(*arguments.evaluate)
    print("| task | rows | peak MiB | bytes a row |\n| --- | ---: | ---: | ---: |")
    for task in arguments.task:
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory() as place:
                job = Path(place, "job.json")
                job.write_text(write_job(task, rows, Path(place)).model_dump_json())
                words = [sys.executable, __file__, "--evaluate", str(job), str(Path(place) / "run")]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
            count, peak, each = done.stdout.split()
            print(f"| {task} | {int(count):,} | {float(peak):,.0f} | {float(each):.0f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
