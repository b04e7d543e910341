"""What a save costs a run: ours, DeepSpeed's save_checkpoint and a plain memory copy of the same bytes, side by side.

python tests/benchmarks/bench_checkpoint.py [--gb 1.2] [--repeats 5] [--folder PLACE]

Two gloo ranks, ZeRO-3, fp32 weights and AdamW's moments. Blocking time is what the step loop waits, in `save` and
before the next update, the longest of the ranks; both kinds of checkpoint end synced to disk. Medians. The slowdown
compares steps from the save to the commit, the copy beside the first of them included, with the steps before.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.crashing import make_engine
from tests.ranks import run_ranks

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.2, help="state of all ranks: fp32 weights and moments")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    layers = 16
    width = int((arguments.gb * 1e9 / 12 / layers) ** 0.5) // 8 * 8
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        found = run_ranks(measure, 2, place, width, layers, arguments.repeats)
    report(found)


def measure(place: str, width: int, layers: int, repeats: int) -> dict[str, Any]:
    """On one rank."""
    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width, layers)
    train_step(engine, width)
    found: dict[str, Any] = {"copy_s": plain_copy(engine, repeats)}
    found |= save_ours(engine, world, Path(place) / "ours", width, repeats)
    found["deepspeed_s"] = save_deepspeed(engine, world, Path(place) / "deepspeed", repeats)
    found |= digest_speed()
    return found


def train_step(engine: Any, width: int, before_update: Callable[[], None] = lambda: None) -> float:
    """Seconds of one step."""
    import torch

    began = time.perf_counter()
    engine.backward(engine(torch.randn(4, width)).square().mean())
    before_update()
    engine.step()
    return time.perf_counter() - began


def meet(world: Any) -> None:

    world.barrier()


def plain_copy(engine: Any, repeats: int) -> list[float]:
    """The same bytes, from where the optimizer holds them to memory that is there already."""
    import torch

    flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    states = [engine.optimizer.optimizer.state[flat] for flat in flats]
    sources = [*flats, *(state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq"))]
    targets = [torch.zeros_like(source) for source in sources]
    seconds = []
    for _ in range(repeats):
        torch.distributed.barrier()
        began = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source.detach())
        seconds.append(time.perf_counter() - began)
    return seconds


def save_ours(engine: Any, world: Any, place: Path, width: int, repeats: int) -> dict[str, Any]:
    """Blocking and whole times, and the steps with and without a writer at work."""
    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.storage import Folder

    events: list[Any] = []
    agent = Checkpointer(engine, Folder(str(place)), world, new_attempt(world), "key", "job", events.append)
    total = agent.prepare()
    blocked, quiet, busy = [], [], []
    for number in range(1, repeats + 1):
        quiet += [train_step(engine, width) for _ in range(2)]
        agent.save(Progress(number, 0))
        busy.append(train_step(engine, width, agent.before_update))
        blocked.append(agent._said["blocked_s"])
        while writing(agent, world):  # so each of these steps begins beside the writers
            busy.append(train_step(engine, width))
        agent.finish()
        meet(world)
        shutil.rmtree(place / f"step-{number:08d}", ignore_errors=True)
    agent.close()
    copied = [event.copy_s for event in events]
    return {
        "bytes": total,
        "beside_s": copied,
        "blocked_s": blocked,
        "quiet_s": quiet,
        "busy_s": busy,
        "events": events,
    }


def writing(agent: Any, world: Any) -> bool:
    """Whether a writer of any rank is still at work; every rank hears the same."""
    import torch
    import torch.distributed as dist

    agent.poll()
    busy = torch.tensor(float(agent._writing.link.busy))
    dist.all_reduce(busy)
    return bool(busy)


def save_deepspeed(engine: Any, world: Any, place: Path, repeats: int) -> list[float]:
    """save_checkpoint, then fsync of what this rank wrote."""
    seconds = []
    for number in range(repeats):
        meet(world)
        began = time.perf_counter()
        engine.save_checkpoint(str(place), tag=f"step-{number}")
        for path in (place / f"step-{number}").glob(f"*rank_{world.rank}_*"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        seconds.append(time.perf_counter() - began)
        meet(world)
        if world.rank == 0:
            shutil.rmtree(place)
    return seconds


def digest_speed() -> dict[str, float]:
    """xxh3-128 alone, and writing with the digest against writing without, in bytes a second."""
    import xxhash

    from trainers.checkpoint.writing import CHUNK_BYTES

    data = memoryview(os.urandom(64 * MIB))
    began = time.perf_counter()
    for _ in range(8):
        digest = xxhash.xxh3_128()
        for start in range(0, len(data), CHUNK_BYTES):
            digest.update(data[start : start + CHUNK_BYTES])
    return {"digest_bytes_per_s": 8 * len(data) / (time.perf_counter() - began)}


def report(found: list[dict[str, Any]]) -> None:
    """The table of docs/checkpoints.md."""

    def longest(name: str) -> float:
        return statistics.median(max(pair) for pair in zip(*(one[name] for one in found), strict=True))

    first = found[0]
    figures = ("copy_s", "blocked_s", "deepspeed_s", "quiet_s", "busy_s")
    print("all of rank 0:", {name: [round(seconds, 3) for seconds in first[name]] for name in figures})
    copy, ours, theirs = longest("copy_s"), longest("blocked_s"), longest("deepspeed_s")
    whole = statistics.median(event.seconds for event in first["events"])
    quiet, busy = statistics.median(first["quiet_s"]), statistics.median(first["busy_s"])
    print(f"state {first['bytes'] / 1e9:.2f} GB on two ranks, {len(first['copy_s'])} saves each, medians\n")
    print("| | seconds | against ours |\n| --- | ---: | ---: |")
    print(f"| step loop blocked, ours | {ours:.3f} | 1 |")
    print(f"| plain memory copy of the same bytes | {copy:.3f} | ours blocks {ours / copy:.2f} times as long |")
    print(f"| our copy, beside the next step | {statistics.median(first['beside_s']):.3f} | |")
    print(f"| step loop blocked, save_checkpoint + fsync | {theirs:.3f} | {theirs / ours:.1f} times ours |")
    print(f"| ours, until committed on disk | {whole:.3f} | |")
    print(f"| step, no writer at work | {quiet:.3f} | |")
    print(f"| step, writers at work ({len(first['busy_s'])} steps) | {busy:.3f} | {busy / quiet - 1:+.1%} |")
    print(f"\nxxh3-128: {statistics.median(one['digest_bytes_per_s'] for one in found) / 1e9:.1f} GB/s a rank")


if __name__ == "__main__":
    main()
