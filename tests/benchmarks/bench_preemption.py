"""SIGTERM to either rank at random moments: committed within the grace time, exit 75, and the same losses in the end.

python tests/benchmarks/bench_preemption.py [--times 20]
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.conftest import make_tokenizer
from tests.recovery import events_of, losses, rank_processes, run_training
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.checkpoint.reading import committed_steps
from trainers.errors import Preempted
from trainers.storage import Folder
from trainers.worker.heartbeat import HeartbeatPage

STEPS = 400


def main() -> None:
    """Preempt, resume, compare, print the table."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bert(folder / "model", make_tokenizer(folder / "tokenizer"))
        job = tiny_job(
            folder, model, "classify", film_rows(120), train={"steps": STEPS}, scale={"workers": 2},
            checkpoint={"every_steps": 5}, evaluate={"while_training": False},
        )  # fmt: skip
        shard_locally(job)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        undisturbed = losses(run_training(job, "undisturbed"))
        slow = [{"kind": "slow", "rank": rank, "step": 0, "seconds": 0.1, "always": True} for rank in range(2)]
        phases, seconds, committed = Counter[str](), [], 0
        for _ in range(arguments.times):
            sent = preempt(draw.randrange(2), draw.uniform(0.0, 4.0))
            try:
                run = run_training(job, "preempted", *slow)
                print("the run ended before it was preempted")
                break
            except Preempted:
                ended = time.time()
            run = Path(job.storage) / "runs" / "preempted"
            phases[sent["phase"]] += 1
            seconds.append(ended - sent["time"])
            last = max(losses(run), default=0)
            committed += last == 0 or last in committed_steps(Folder(str(run)) / "checkpoints")
        run = run_training(job, "preempted")
        ray.shutdown()
        print(f"preempted {len(seconds)} times, by phase of the rank that was told: {dict(phases)}")
        print(f"every step done was committed: {committed} of {len(seconds)}")
        print(f"SIGTERM to the end of the run: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")
        print(f"launches: {len(events_of(run, 'start'))}; losses equal bit for bit: {losses(run) == undisturbed}")


def preempt(rank: int, after_s: float) -> dict[str, object]:
    """Send SIGTERM to a rank some seconds after it was born; says when, and in which phase."""
    sent: dict[str, object] = {}

    def send() -> None:
        while f"rank-{rank}" not in rank_processes():
            time.sleep(0.02)
        time.sleep(after_s)
        process = rank_processes()[f"rank-{rank}"]
        sent["time"], sent["phase"] = time.time(), phase_of(process)
        os.kill(process, signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    return sent


def phase_of(process: int) -> str:
    """What the heartbeat of a rank says, found by its mapping."""
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if line.endswith("/heartbeat"):
            return HeartbeatPage(Path(line.split()[-1])).read().phase
    return "start"


if __name__ == "__main__":
    main()
