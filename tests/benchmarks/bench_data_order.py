"""Packing, seeking and waiting: what stands between shards and the training step.

python tests/benchmarks/bench_data_order.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trainers.data.dataset import ShardSet
from trainers.data.index import fold, unfold
from trainers.data.manifest import ShardManifest, ShardRecord
from trainers.data.order import plan_order
from trainers.data.packing import pack_rows
from trainers.storage import Folder
from trainers.tasks import load_task

ROWS, SHARDS = 1_000_000, 1_000_000


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
    records = [ShardRecord.model_construct(file=f"shard-{i:05d}.arrow", ledger="", source=0, rows=1000, tokens=500_000,
                                           targets=1, bytes=1, digest="", outcomes={}, tokens_lost=0, labels={})
               for i in range(SHARDS)]  # fmt: skip
    manifest = ShardManifest.model_construct(key="k", key_parts={}, split="train", task="pretrain", sources=("a",),
                                             shards=tuple(records), entries=())  # fmt: skip
    started = time.perf_counter()
    shards = ShardSet(Folder("nowhere"), manifest, load_task("pretrain"))
    opened = time.perf_counter() - started
    order = plan_order(len(shards), 1024, 1, None, 0)

    def seek() -> Any:
        rows = order.step(int(draw.integers(order.steps)))
        return np.searchsorted(shards._starts, rows, side="right") - 1

    print(f"a set of {SHARDS:,} shards and {len(shards):,} rows: opened in {opened:.2f} s, "
          f"a step of 1,024 found in {median_s(seek, 21) * 1e3:.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
