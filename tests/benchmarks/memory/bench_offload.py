"""State beyond memory: what the plan counts for ranks on CPUs, beside what real ranks hold.

python tests/benchmarks/memory/bench_offload.py [--cells TEXT] [--record FILE]

Every cell is a real job of two steps and a checkpoint, with gloo ranks of one thread each. Each runs twice: with freed
memory given back at once, for which the plan counts, and as the C library keeps it. State on disk needs DeepSpeed's
async I/O built (docs/step.md). A Llama of 104 million parameters (`bench_billion.py --size 100m`) served to find out
what DeepSpeed holds; none of these was looked at for that. Needs no GPU.
"""

import argparse
import json
import os
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


def cells() -> list[Cell]:
    """Sizes, groups, ranks and types; state on disk, then in host memory."""
    tall = Cell("tall", 128, 1, way="zero3-nvme-offload", workers=2, dtype="bfloat16", groups=10)
    broad = replace(tall, shape="broad", groups=30)
    in_memory = replace(tall, way="zero3-cpu-offload", groups=0)
    return [
        tall, replace(tall, dtype="float32", groups=30), replace(tall, workers=1, groups=20), replace(tall, groups=0),
        broad, replace(broad, workers=1, dtype="float32", groups=10), replace(broad, accumulation=2, groups=10),
        in_memory, replace(in_memory, shape="broad", dtype="float32"), replace(in_memory, shape="broad", workers=1),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="only those whose description holds this")
    parser.add_argument("--record", type=Path, help="a file that gets a line of JSON a cell")
    asked = parser.parse_args()
    found = []
    print("| job | measured MiB | plan | off | fullest | with memory kept | CPU s a step | kept |\n"
          "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for cell in cells():
            if asked.cells in str(cell):
                found.append(measure(Path(place), cell))
                print(row(found[-1]), flush=True)
                if asked.record:
                    with asked.record.open("a") as stream:
                        stream.write(json.dumps(found[-1]) + "\n")
    errors = [line["said"] / line["real"] - 1 for line in found]
    print(f"\n{len(found)} runs never looked at: median error {statistics.median(map(abs, errors)):.1%}, worst "
          f"{max(errors, key=abs):+.1%}")  # fmt: skip


def measure(place: Path, cell: Cell) -> dict[str, Any]:
    """A cell, in both ways; of the ranks the largest."""
    job = make_job(place, cell)
    need = predict(job, cell)
    line: dict[str, Any] = {"cell": str(cell), "said": need.counted + need.reserve, "moment": need.moment}
    for exact, name in ((True, "real"), (False, "kept")):
        ranks = run_ranks(train_and_measure, cell.workers, job, exact)
        line |= {name: max(rank["peak"] for rank in ranks), f"{name}_s": max(rank["step_s"] for rank in ranks)}
        shutil.rmtree(Path(job.storage) / "runs")
    return line


def row(line: dict[str, Any]) -> str:
    sizes = [f"{line[name] / MIB:,.0f}" for name in ("real", "said")]
    figures = [*sizes, f"{line['said'] / line['real'] - 1:+.1%}", line["moment"], f"{line['kept'] / MIB:,.0f}",
               f"{line['real_s']:.1f}", f"{line['kept_s']:.1f}"]  # fmt: skip
    return f"| {line['cell']} | {' | '.join(figures)} |"


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
