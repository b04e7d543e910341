"""The plan's memory beside the peak of real ranks, and beside DeepSpeed's own estimators, in one table.

python tests/benchmarks/memory/bench_memory.py [--cells TEXT] [--heap]   # real CPU runs over models and settings
python tests/benchmarks/memory/bench_memory.py --write docs/memory.md    # and the table goes into that page
python tests/benchmarks/memory/bench_memory.py --long                    # packs of 16,384 positions: shared, in tiles

Every cell is a real job: a model of 12 to 40 million random weights, real shards, gloo ranks of one thread each, two
steps, a checkpoint. Measured is the largest resident memory of any rank over what it held before it loaded anything of
the job. The shape `small` served to find out what DeepSpeed, gloo and torch hold, and one job of `deep` what the C
library keeps; no other was looked at for that. With --heap the C library keeps freed memory, as it does unless told
otherwise.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.benchmarks.memory.cells import MIB, Cell, make_job, predict, train_and_measure
from tests.ranks import run_ranks

WAYS = ("zero0", "zero1", "zero2", "zero3")
LOOKED_AT = replace(Cell("deep", 256, 2), dtype="bfloat16", way="zero3", workers=2, accumulation=2)
"""Beside shape `small`: from it came from which size on freed memory must be given back (`GIVE_BACK_BYTES`)."""
BEGIN, END = "<!-- bench_memory: begin -->", "<!-- bench_memory: end -->"


def cells() -> list[Cell]:
    """The grid: those of shape `small`, from which constants come, then those that nothing comes from."""
    small = Cell("small")
    known = [replace(small, way=way, workers=workers) for way in WAYS for workers in (1, 2)]
    known += [replace(small, way=way, again="full", micro=4, length=256) for way in WAYS]
    short = replace(small, length=256)
    known += [
        replace(short, again=2), replace(short, lora=True), replace(short, way="zero3", workers=2, lora=True),
        replace(short, way="zero2", workers=2, dtype="bfloat16", accumulation=2), replace(short, documents=4),
        replace(short, way="zero3", workers=2, dtype="bfloat16"), replace(short, dtype="bfloat16"),
        replace(short, way="zero1", workers=2, accumulation=2), replace(short, accumulation=2),
    ]  # fmt: skip
    deep, wide, words = Cell("deep", 256, 2), Cell("wide", 640, 1), Cell("vocabulary", 256, 2)
    masked = Cell("bert", 320, 2, task="mlm")
    named = replace(masked, task="classify", length=256)
    return [
        replace(deep, micro=4), replace(deep, way="zero1", workers=2, again=2),
        replace(deep, way="zero2", workers=2), replace(deep, way="zero3", workers=2, again="full"),
        replace(deep, way="zero3"), replace(deep, documents=4, way="zero2"), replace(deep, lora=True, way="zero2"),
        LOOKED_AT,
        replace(wide, way="zero0", workers=2), replace(wide, way="zero1"), replace(wide, way="zero2", again="full"),
        replace(wide, way="zero3", workers=2), replace(wide, documents=5), replace(wide, accumulation=2, way="zero3"),
        replace(wide, dtype="bfloat16", way="zero1", workers=2), replace(wide, lora=True, way="zero3", workers=2),
        replace(words, way="zero0"), replace(words, way="zero3", workers=2), replace(words, again="full", way="zero1"),
        replace(masked, way="zero0"), replace(masked, way="zero2", workers=2),
        replace(masked, way="zero3", again="full"), replace(named, way="zero1"), replace(named, way="zero3", workers=2),
        replace(deep, dtype="bfloat16", way="zero2", workers=2),
        replace(wide, dtype="bfloat16", way="zero3", workers=2, accumulation=2),
        *known,
    ]  # fmt: skip


def long_cells() -> list[Cell]:
    """Packs of 16,384 positions in many documents: whole, shared by two ranks, with feed-forward layers in tiles."""
    long = Cell("slim", 16_384, 1, documents=128, workers=2, way="zero3")
    alone = replace(long, workers=1, way="zero0", again="full")
    return [
        long, replace(long, sharing=2), replace(long, tiled=True), replace(long, sharing=2, tiled=True),
        alone, replace(alone, tiled=True), replace(long, way="zero2", again="full", sharing=2, tiled=True),
        replace(long, dtype="bfloat16", again="full", sharing=2), replace(long, dtype="bfloat16", tiled=True),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="only those whose description holds this")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--record", type=Path, help="a file that gets a line of JSON a cell, and is gone on from")
    asked = parser.parse_args()
    found = []
    known = {}
    if asked.record and asked.record.exists():
        known = {line["cell"]: line for line in map(json.loads, asked.record.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as place:
        for cell in long_cells() if asked.long else cells():
            if asked.cells in str(cell):
                line = known.get(str(cell)) or measure(Path(place), cell, not asked.heap)
                if asked.record and str(cell) not in known:
                    with asked.record.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                found.append(line)
                print(row(line), file=sys.stderr, flush=True)
    lines = table(found)
    print("\n".join(lines))
    if asked.write:
        before, _, rest = asked.write.read_text().partition(BEGIN)
        asked.write.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}")


def measure(place: Path, cell: Cell, exact: bool) -> dict[str, Any]:
    """One cell: what was said, what DeepSpeed says, and the largest rank."""
    job = make_job(place, cell)
    need = predict(job, cell)
    ranks = run_ranks(train_and_measure, cell.workers, job, exact)
    shutil.rmtree(job.storage)
    known = cell.shape == "small" or cell == LOOKED_AT
    return {"cell": str(cell), "known": known, "said": need.counted + need.reserve,
            "moment": need.moment, "real": max(rank["peak"] for rank in ranks), "staging": need.staging,
            "deepspeed": estimate(job, cell)}  # fmt: skip


def estimate(job: Any, cell: Cell) -> int:
    """What DeepSpeed's estimators say of a device: model states, with their factor of 1.5 for buffers."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from trainers.model.fit import tensor_shapes

    sizes = {name: int(__import__("math").prod(shape)) for name, shape in tensor_shapes(Path(job.model.path)).items()}
    total = sum(sizes.values())
    if cell.way == "zero3":
        largest = max(sizes.values())
        return int(estimate_zero3_model_states_mem_needs(total, largest, cell.workers, 1, False, False, True)[1])
    return int(estimate_zero2_model_states_mem_needs(total, cell.workers, 1, False)[1])


def off(line: dict[str, Any]) -> float:
    return float(line["said"] / line["real"] - 1)


def row(line: dict[str, Any]) -> str:
    theirs = line["deepspeed"] / (line["real"] - line["staging"]) - 1
    figures = (f"{line['real'] / MIB:,.0f}", f"{line['said'] / MIB:,.0f}", f"{off(line):+.1%}", line["moment"],
               f"{line['deepspeed'] / MIB:,.0f}", f"{theirs:+.0%}")  # fmt: skip
    return f"| {line['cell']} | {' | '.join(figures)} |"


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| job | measured MiB | plan | off | fullest | DeepSpeed's | off, without staging |",
             "| --- | ---: | ---: | ---: | --- | ---: | ---: |"]  # fmt: skip
    lines += [row(line) for line in found]
    lines.append("")
    for name, some in (
        ("looked at", [x for x in found if x["known"]]),
        ("never looked at", [x for x in found if not x["known"]]),
    ):
        if len(some) > 1:
            errors = sorted(abs(off(line)) for line in some)
            under = sum(off(line) < 0 for line in some)
            ours = statistics.median(abs(line["said"] - line["real"]) for line in some)
            theirs = statistics.median(abs(line["deepspeed"] - line["real"] + line["staging"]) for line in some)
            lines.append(
                f"{len(some)} runs {name}: median error {statistics.median(errors):.1%}, 95th percentile "
                f"{errors[-(-len(errors) * 95 // 100) - 1]:.1%}, worst {errors[-1]:.1%}; {under} below what was "
                f"measured, by at most {max(0.0, -min(map(off, some))):.1%}; median absolute error "
                f"{ours / MIB:,.0f} MiB, DeepSpeed's estimators {theirs / MIB:,.0f} MiB ({theirs / ours:.0f} times)"
            )
    return lines


if __name__ == "__main__":
    main()
