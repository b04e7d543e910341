"""The loop beside a loop by hand, transformers' Trainer and TRL's SFTTrainer, all under DeepSpeed's ZeRO-3 on two gloo
ranks of a CPU, with one DeepSpeed configuration (ours), one model, fp32 and torch's fused AdamW.

python tests/benchmarks/loop/bench_loop.py [--steps 15] [--only full|documents] [--like rows.jsonl]

All contenders live at the same time and take turns, a step each. Counted are tokens that are no padding, in a CPU
second of both ranks and in a second by the clock; a contender's figure is the median of its steps, `times` the median
over the turns. The first steps are left out, for ZeRO-3 learns then. Nothing is shown unless losses of the first step
agree. `full`: rows of one length. `documents`: lengths as those of chats, in words, of a JSONL of your own with
`--like`; without it log-normal ones. Padded in the order in which they come, half of a micro-batch is padding.
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from orchestrator.training.node_report import free_port
from tests.benchmarks.loop import contenders, peers
from tests.benchmarks.loop.contenders import LENGTH, RANKS, Enough, make_job, padding_share
from tests.benchmarks.loop.turns import Turns

WARM_UP = 3
"""Steps that are left out."""
CONTENDERS: dict[str, tuple[str, Any]] = {
    "ours": ("full", contenders.ours), "by hand": ("full", contenders.by_hand), "Trainer": ("full", peers.trainer),
    "ours, documents": ("documents", contenders.ours), "ours, packed": ("packed", contenders.ours),
    "Trainer, documents": ("documents", peers.trainer), "Trainer, by length": ("documents", peers.grouped),
    "TRL, packed": ("packed", peers.trl),
}  # fmt: skip
GROUPS = {"full": ["ours", "by hand", "Trainer"],
          "documents": ["ours, documents", "ours, packed", "Trainer, documents", "Trainer, by length",
                        "TRL, packed"]}  # fmt: skip
PEERS = [("ours", "by hand"), ("ours", "Trainer"), ("ours, documents", "Trainer, documents"),
         ("ours, documents", "Trainer, by length"), ("ours, packed", "Trainer, documents"),
         ("ours, packed", "ours, documents"), ("ours, packed", "TRL, packed")]  # fmt: skip
SAME_ROWS = {("ours", "by hand"), ("ours", "Trainer"), ("ours, documents", "Trainer, documents")}
"""Whose first steps hold the same rows; other rows of the same kind have nearly that loss."""


@dataclass
class Alive:
    """Both ranks of one contender."""

    name: str
    processes: list[subprocess.Popen[bytes]]
    go: list[int]
    said: list[int]
    steps: list[dict[str, float]] = field(default_factory=list)

    def turn(self) -> None:
        for each in self.go:
            os.write(each, b"g")
        told = [json.loads(self.line(each)) for each in self.said]
        tokens, cpu_s = (sum(each[key] for each in told) for key in ("tokens", "cpu_s"))
        step = {"cpu": tokens / cpu_s, "wall": tokens / max(each["wall_s"] for each in told), "cpu_s": cpu_s}
        self.steps.append({**step, "first": told[0]["first"] or 0.0})

    def line(self, said: int) -> bytes:
        while not select.select([said], [], [], 1.0)[0]:
            if any(each.poll() is not None for each in self.processes):
                raise SystemExit(f"{self.name} ended before its last step")
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(said, 1)
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", choices=list(GROUPS))
    parser.add_argument("--like", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pipes", nargs=2, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    lengths = lengths_of(asked.like)
    if asked.contender:
        contend(asked, lengths)
    print("| | over | tokens a CPU second | times | tokens a second | times |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for group in [asked.only] if asked.only else GROUPS:
        with tempfile.TemporaryDirectory() as place:
            asked.folder = Path(place)
            for kind in sorted({CONTENDERS[name][0] for name in GROUPS[group]}):
                job = make_job(asked.folder, kind, asked.steps, lengths)
                if kind == "documents":
                    print(f"documents, padded as they come: {padding_share(job):.0%} padding", file=sys.stderr)
            show(compete(asked, GROUPS[group]))
    print(f"hooks, events and heartbeat: {hook_ms():.3f} ms a step")


def lengths_of(rows: Path | None) -> list[int]:
    """Tokens of documents: the words of somebody's rows, or log-normal."""
    if rows is None:
        draws = np.random.default_rng(1).lognormal(np.log(LENGTH / 3), 0.7, 2000)
        return [int(each) for each in draws]
    return [len(line.split()) for line in rows.read_text().splitlines()]


def compete(asked: argparse.Namespace, names: list[str]) -> dict[str, list[dict[str, float]]]:
    alive = [launch(asked, name) for name in names]
    try:
        for number in range(asked.steps):
            for each in alive[number % len(alive) :] + alive[: number % len(alive)]:
                each.turn()
            told = ", ".join(f"{each.name} {each.steps[-1]['cpu_s']:.2f}" for each in alive)
            print(f"step {number + 1}, CPU seconds: {told}", file=sys.stderr, flush=True)
    finally:
        for process in (process for each in alive for process in each.processes):
            process.kill()
    return {each.name: each.steps for each in alive}


def launch(asked: argparse.Namespace, name: str) -> Alive:
    port, alive = free_port(), Alive(name, [], [], [])
    for rank in range(RANKS):
        ear, go = os.pipe()
        said, mouth = os.pipe()
        words = ["--contender", name, "--folder", str(asked.folder), "--steps", str(asked.steps)]
        words += ["--pipes", str(ear), str(mouth)] + (["--like", str(asked.like)] if asked.like else [])
        told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        told |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            stdout=sys.stderr,
            pass_fds=(ear, mouth),
            env=os.environ | told | {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        )
        alive.processes.append(process)
        alive.go.append(go)
        alive.said.append(said)
    return alive


def contend(asked: argparse.Namespace, lengths: list[int]) -> None:
    """One rank of one contender."""
    import torch

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})  # no rank moves, and none makes way
    kind, contender = CONTENDERS[asked.contender]
    job = make_job(asked.folder, kind, asked.steps, lengths)
    try:
        contender(job, Turns(*asked.pipes))
    except Enough:
        pass
    finally:
        sys.stderr.flush()
    time.sleep(3600)  # engines and process groups need not be taken apart; whoever started this rank ends it


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """Nobody's time counts unless each begins with its peer's loss."""
    first = {name: next(step["first"] for step in steps if step["first"]) for name, steps in found.items()}
    for pair in (pair for pair in PEERS if set(pair) <= set(found)):
        mine, peers_ = (first[name] for name in pair)
        if abs(mine - peers_) > (2e-5 if pair in SAME_ROWS else 0.01) * peers_:
            raise SystemExit(f"losses of the first step differ, so times compare nothing: {first}")
        cells = []
        for clock in ("cpu", "wall"):
            speeds = [[step[clock] for step in found[name][WARM_UP:]] for name in pair]
            times = statistics.median(own / other for own, other in zip(*speeds, strict=True))
            cells += [" / ".join(f"{statistics.median(each):,.0f}" for each in speeds), f"{times:.3f}"]
        print(f"| {pair[0]} | {pair[1]} | {' | '.join(cells)} |", flush=True)


def hook_ms(steps: int = 2000) -> float:
    """CPU time a step of all that a rank tells outside in it: five phases, four questions, one event."""
    from trainers.run.events import StepEvent
    from trainers.worker.heartbeat import HeartbeatPage
    from trainers.worker.stop_signal import PipeHooks, StopSignal

    with tempfile.TemporaryDirectory() as place, (Path(place) / "events").open("w") as events:
        hooks = PipeHooks(events, HeartbeatPage(Path(place) / "page"), StopSignal(30.0))
        told = {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 1, "tokens_per_s": 1.0, "step_s": 1.0}
        began = time.process_time()
        for step in range(steps):
            for phase in ("data", "step", "settle", "save", "step"):
                hooks.at(phase, step)  # type: ignore[arg-type]
            for _ in range(4):
                hooks.stop_reason()
            hooks.emit(StepEvent(step=step, data_wait_s=0.0, memory_gib=1.0, **told))
        return (time.process_time() - began) / steps * 1000


if __name__ == "__main__":
    main()
