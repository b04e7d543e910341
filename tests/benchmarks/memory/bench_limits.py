"""Whether the plan is right that a job fits: real ranks in a control group whose memory is limited.

python tests/benchmarks/memory/bench_limits.py      # root, and a memory controller: cgroup v1 or v2

Jobs times the limits that lie nearest to what they need. `fits` is said where what the plan counts for all ranks, and
a margin of 5 %, is within the limit. Then the ranks run in a group of that limit: they end, or the kernel kills one.
The limit is for what ranks take beyond the process they are forks of.
"""

import os
import shutil
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
from orchestrator.training.node_report import free_port
from tests.benchmarks.memory.cells import MIB, Cell, make_job, predict, train_and_measure
from tests.ranks import rank_context
from trainers.model.memory import CPU_IMPORT_BYTES

LIMITS = {1: (640, 800, 960, 1120, 1280), 2: (1120, 1360, 1600, 1840, 2080)}
"""MiB, by the number of ranks."""
ROOT = Path("/sys/fs/cgroup")


def jobs() -> list[Cell]:
    """Jobs whose needs lie among the limits."""
    deep, wide = Cell("deep", 128, 2), Cell("wide", 128, 2)
    two = replace(deep, workers=2)
    return [
        replace(deep, again="full"), replace(two, way="zero3", again="full"), replace(wide, way="zero1"),
        replace(wide, way="zero1", workers=2), replace(deep, length=256),
        replace(two, way="zero2", dtype="bfloat16"), replace(Cell("small", 128, 1), way="zero3"),
        replace(Cell("small", 128, 1), way="zero3", workers=2), replace(Cell("bert", 128, 2, task="mlm"), way="zero2"),
    ]  # fmt: skip


def main() -> None:
    calls = []
    print("| job | plan MiB | below | near | above |\n| --- | ---: | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for cell in jobs():
            job = make_job(Path(place), cell)
            need = (predict(job, cell).device - CPU_IMPORT_BYTES) * cell.workers
            shown = []
            for limit in nearest(need, LIMITS[cell.workers]):
                fits, lived = need <= limit * MIB, run_limited(job, cell.workers, limit * MIB)
                shutil.rmtree(Path(job.storage) / "runs", ignore_errors=True)
                calls.append((fits, lived))
                shown.append(f"{limit:,}: {'fits' if fits else 'no'}, {'ran' if lived else 'killed'}")
                print(cell, shown[-1], file=sys.stderr, flush=True)
            print(f"| {cell} | {need / MIB:,.0f} | " + " | ".join(shown) + " |", flush=True)
    right = sum(fits == lived for fits, lived in calls)
    died = sum(fits and not lived for fits, lived in calls)
    print(f"\n{right} of {len(calls)} calls right ({right / len(calls):.0%}); {died} that were said to fit were killed")


def nearest(need: int, limits: tuple[int, ...]) -> tuple[int, ...]:
    """Three limits around what is needed: those farther off are easily told."""
    first = sorted(range(len(limits)), key=lambda at: abs(limits[at] * MIB - need))[0]
    first = min(max(first - 1, 0), len(limits) - 3)
    return limits[first : first + 3]


def run_limited(job: Any, workers: int, limit: int) -> bool:
    """Whether the ranks of a job end well within the limit."""
    unified = (ROOT / "cgroup.controllers").exists()
    group = (ROOT if unified else ROOT / "memory") / f"tuneyard-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
        port, environment = free_port(), dict(os.environ)
        ranks = [rank_context().Process(target=enter, args=(group, job, rank, workers, port, environment), daemon=True)
                 for rank in range(workers)]  # fmt: skip
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and all(rank.exitcode in (None, 0) for rank in ranks):
            time.sleep(0.2)
        lived = all(rank.exitcode == 0 for rank in ranks)
        for rank in ranks:
            rank.kill()
            rank.join()
        return lived
    finally:
        for _ in range(50):  # what was killed takes a moment to go
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def enter(group: Path, job: Any, rank: int, workers: int, port: int, environment: dict[str, str]) -> None:
    """Join the group, then be the rank."""
    import torch

    (group / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    train_and_measure(job, True)
    os._exit(0)


if __name__ == "__main__":
    main()
