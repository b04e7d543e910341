"""Packing, seeking and waiting: what stands between shards and the training step.

python tests/benchmarks/bench_data_order.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainers.batching.packing import fold, pack_rows, unfold
from trainers.shards.manifest import MANIFEST, ShardManifest, ShardRecord, write_manifest
from trainers.sources.readers import MOST_UNITS
from trainers.storage import Folder

ROWS, ROWS_A_SHARD = 1_000_000, 61_000


def median_s(function: Callable[[], Any], repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def first_fit(lengths: Any, capacity: int) -> float:
    """The usual greedy packer: rows in their order, a new sequence where the next does not fit. Share of room used."""
    packs, used = 1, 0
    for length in lengths.tolist():
        if used + length > capacity:
            packs, used = packs + 1, 0
        used += length
    return float(lengths.sum()) / (packs * capacity)


def main() -> None:
    draw = np.random.default_rng(0)
    print("| packing a million rows | s | full | first come, first served |\n| --- | ---: | ---: | ---: |")
    for capacity in (2048, 4096, 8192):
        lengths = np.clip(np.round(np.exp(draw.normal(5.3, 0.9, ROWS))), 8, capacity).astype(np.int32)
        seconds = median_s(lambda lengths=lengths, capacity=capacity: pack_rows(lengths, capacity, 0))
        packs = pack_rows(lengths, capacity, 0)
        full = lengths.sum() / (len(packs) * capacity)
        print(f"| {capacity} | {seconds:.2f} | {full:.4%} | {first_fit(lengths, capacity):.2%} |")
    stored = fold(packs)
    print(f"\nopening the stored index: {median_s(lambda: unfold(stored)) * 1e6:.0f} us")
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(place)
        write_manifest(folder, largest_manifest())
        size = Path(place, MANIFEST).stat().st_size / 1e6
        command = [sys.executable, "-c", SEEK, place]
        found = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]
    print(f"\na set of {MOST_UNITS:,} shards and {MOST_UNITS * ROWS_A_SHARD:,} rows, each time in a fresh process")
    print(f"(manifest {size:.1f} MB):")
    for name in found[0]:
        print(f"  {name}: {statistics.median(one[name] for one in found):.3f} s")


def largest_manifest() -> ShardManifest:
    """The manifest of a made-up split with as many shards as large files are cut into."""
    shards = tuple(
        ShardRecord(
            file=f"shard-{place:05d}.arrow", ledger=f"ledger-{place:05d}.arrow", unit=f"{place:016x}",
            source=place % 1000, rows=ROWS_A_SHARD, tokens=place + 500 * ROWS_A_SHARD, targets=place, bytes=place,
            digest=f"{place:032x}", outcomes={"dropped:malformed": 1, "kept": ROWS_A_SHARD}, tokens_lost=0,
        )
        for place in range(MOST_UNITS)
    )  # fmt: skip
    return ShardManifest(key="k", key_parts={}, split="train", task="pretrain", shards=shards,
                         sources=tuple(f"/data/{place}.jsonl" for place in range(1000)))  # fmt: skip


SEEK = """
import json, sys, time
import numpy as np
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import read_manifest
from trainers.batching.order import plan_order
from trainers.storage import Folder
from trainers.tasks import load_task
task, folder = load_task("pretrain"), Folder(sys.argv[1])
times = [time.perf_counter()]
manifest = read_manifest(folder)
times.append(time.perf_counter())
shards = ShardSet(folder, manifest, task)
order = plan_order(len(shards), 1024, 1, None, 0)
times.append(time.perf_counter())
rows = order.step(order.steps - 2)
records = [manifest.shards[int(np.searchsorted(shards._starts, row, side="right")) - 1] for row in rows]
times.append(time.perf_counter())
sums = manifest.rows_in, manifest.dropped, manifest.total("tokens")
times.append(time.perf_counter())
names = ("manifest read", "set opened", "a step of 1,024 and the records of its shards found",
         "outcomes and tokens summed")
print(json.dumps(dict(zip(names, np.diff(times).tolist()))))
"""


if __name__ == "__main__":
    main()
