"""Goodput under a kill every minute, beside what the Young/Daly interval allows for the costs measured in the same run.

    python tests/benchmarks/bench_goodput.py [--kills 4] [--every 60]

Two ranks of a tiny model whose steps are slowed to a tenth of a second, a checkpoint about every second.
"""

import argparse
import math
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

from tests.conftest import make_tokenizer
from tests.recovery import events_of, rank_processes, run_training
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.run.events import StageEvent, StageStartEvent, read_events
from trainers.run.goodput import account
from trainers.storage import Folder

STEP_S, EVERY_STEPS = 0.1, 10


def main() -> None:
    """Train, kill, account, print the table."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--every", type=float, default=60.0)
    arguments = parser.parse_args()
    steps = int((arguments.kills + 0.5) * arguments.every * 0.85 / STEP_S)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bert(folder / "model", make_tokenizer(folder / "tokenizer"))
        job = tiny_job(
            folder, model, "classify", film_rows(120), train={"steps": steps}, scale={"workers": 2},
            checkpoint={"every_steps": EVERY_STEPS}, evaluate={"while_training": False},
        )  # fmt: skip
        shard_locally(job)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        slow = [{"kind": "slow", "rank": rank, "step": 0, "seconds": STEP_S, "always": True} for rank in range(2)]
        done = threading.Event()
        threading.Thread(target=kill_every, args=(arguments.every, done), daemon=True).start()
        began = time.time()
        run = run_training(job, "mortal", *slow)
        ended = time.time()
        done.set()
        ray.shutdown()
        report(run, began, ended)


def kill_every(seconds: float, done: threading.Event) -> None:
    """SIGKILL one rank or the other."""
    draw = random.Random(0)
    while not done.wait(seconds):
        ranks = rank_processes()
        if ranks:
            os.kill(draw.choice(list(ranks.values())), signal.SIGKILL)


def report(run: Path, began: float, ended: float) -> None:
    """The account, and its goodput beside the allowed one."""
    events = read_events(Folder(str(run)))
    begin, end = (
        StageStartEvent(stage="train", time=began),
        StageEvent(stage="train", seconds=ended - began, time=ended),
    )
    spent = account([begin, *events, end])
    kills = len(events_of(run, "restart"))
    saves = events_of(run, "checkpoint")
    wall = ended - began - spent["startup"]
    save_s = spent["checkpoint"] / max(len(saves), 1)
    restart_s, mtbf_s = spent["restart"] / kills, wall / kills
    interval_s = math.sqrt(2 * save_s * mtbf_s)  # Young 1974
    allowed = 1 - (restart_s + interval_s / 2) / mtbf_s - save_s / interval_s
    found = (spent["productive"] + spent["data_wait"]) / wall
    print("| kind | seconds | share |\n| --- | --- | --- |")
    for kind, seconds in spent.items():
        print(f"| {kind} | {seconds:.1f} | {seconds / (ended - began):.1%} |")
    print(f"sum of the account / wall time: {sum(spent.values()) / (ended - began):.4f}")
    print(f"{kills} kills, one every {mtbf_s:.0f} s; a save costs {save_s * 1000:.0f} ms, a restart {restart_s:.1f} s")
    print(
        f"goodput after the start: {found:.1%}; allowed at the Young/Daly interval of {interval_s:.1f} s: {allowed:.1%}"
    )
    print(f"ratio: {found / allowed:.1%}")


if __name__ == "__main__":
    main()
