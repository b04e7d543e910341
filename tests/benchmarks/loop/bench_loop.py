"""The loop beside a loop by hand, both under DeepSpeed's ZeRO-3 on two gloo ranks of a CPU; and what packing gains.

python tests/benchmarks/loop/bench_loop.py [--rounds 2] [--steps 6]

`by hand` gets the engine's whole configuration from ours; sequences are of full length. On documents, about half of a
padded batch being padding, `ours packed` is compared with `ours unpacked`. Counted are tokens that are no padding in a
CPU second of both ranks; the first steps are left out, for ZeRO-3 learns then. Contenders take turns, round by round;
medians. Nothing is shown unless losses of the first step agree. The sampler that finds stragglers costs by the clock:
on a busy machine, where a step takes longer than its CPU seconds, it weighs more than on a free one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.benchmarks.loop.contenders import RANKS, by_hand, make_job, ours
from tests.ranks import free_port

WARM_UP = 3
"""Steps that are left out."""
PEERS = {"ours": "by hand", "ours packed": "ours unpacked"}
"""Whom each is compared with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        contend(asked)
        return
    names = ["ours", "by hand", "ours unpacked", "ours packed"]
    with tempfile.TemporaryDirectory() as place:
        asked.folder = Path(place)
        for kind in ("full", "unpacked", "packed"):
            make_job(asked.folder, kind, asked.steps)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(asked.rounds):
            for name in names:
                results[name].append(launch(asked, name))
                print(f"{name}: {results[name][-1]['speed']:,.0f} tokens a CPU second", file=sys.stderr)
    check_losses(results)
    print(f"{hook_ms():.3f} ms a step for hooks, events and heartbeat")
    print("| | over | tokens a CPU second | times |\n| --- | --- | ---: | ---: |")
    speeds = {name: statistics.median(each["speed"] for each in rounds) for name, rounds in results.items()}
    for name, peer in PEERS.items():
        speed = speeds[name]
        print(f"| {name} | {peer} | {speed:,.0f} / {speeds[peer]:,.0f} | {speed / speeds[peer]:.3f} |")


def environment(rank: int, port: int) -> dict[str, str]:
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | told | {"TOKENIZERS_PARALLELISM": "false"}


def launch(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both ranks of one contender: tokens a CPU second of the two together, losses."""
    port = free_port()
    words = ["--contender", name, "--folder", str(asked.folder), "--steps", str(asked.steps)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, env=environment(rank, port)
        )
        for rank in range(RANKS)
    ]
    told = [each.communicate()[0] for each in ranks]
    found = [json.loads(line.removeprefix("RESULT")) for text in told for line in text.splitlines()
             if line.startswith("RESULT")]  # fmt: skip
    if len(found) < RANKS:
        raise SystemExit(f"{name} failed:\n" + "\n".join(told))
    seconds = sum(sum(each["seconds"][WARM_UP:]) for each in found)
    return {"speed": sum(found[0]["tokens"][WARM_UP:]) / seconds, "losses": found[0]["losses"]}


def contend(asked: argparse.Namespace) -> None:
    """One rank of one contender: CPU seconds and tokens of each step, losses as far as the contender tells them."""
    import torch

    torch.set_num_threads(1)
    kind = {"ours": "full", "by hand": "full", "ours packed": "packed"}.get(asked.contender, "unpacked")
    job = make_job(asked.folder, kind, asked.steps)
    contender = by_hand if asked.contender == "by hand" else ours
    marks, tokens, losses = contender(job, asked)
    result = {"seconds": np.diff(marks).tolist(), "tokens": tokens, "losses": losses}
    print("\nRESULT", json.dumps(result), flush=True)
    os._exit(0)  # engines and process groups need not be taken apart


def check_losses(results: dict[str, list[dict[str, Any]]]) -> None:
    """Nobody's time counts unless each begins with its peer's loss; packs of other documents have nearly that loss."""
    first = {name: rounds[0]["losses"][0] for name, rounds in results.items()}
    for name, peer in PEERS.items():
        apart = 1e-4 if name == "ours" else 0.01
        if abs(first[name] - first[peer]) > apart * first[peer]:
            raise SystemExit(f"losses of the first step differ, so times compare nothing: {first}")


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
