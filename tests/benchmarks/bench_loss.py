"""Memory and time of the loss over a large vocabulary: in chunks, against all logits at once and torch's own way.

python tests/benchmarks/bench_loss.py [--positions 8192] [--vocabulary 152064] [--width 64] [--pairs 3]

Each run is a process of its own, forward and backward of output layer and loss, fp32; runs of the ways are interleaved.
Memory is the peak of the process over what it held before (VmHWM), so it counts the gradient of the layer too. The
loss and a random weighted sum of each gradient are compared first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
WAYS = ("chunks", "at_once", "linear_cross_entropy")


def peak_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def loss_of(way: str, hidden: Any, weight: Any, labels: Any) -> Any:
    import torch

    from trainers.tasks.losses.chunked import ChunkedLoss

    if way == "chunks":
        return ChunkedLoss.apply(hidden, weight, None, labels, 0.0, None)
    if way == "linear_cross_entropy":
        return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def run(way: str, positions: int, vocabulary: int, width: int) -> None:
    import torch

    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
    hidden = torch.randn(positions, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (positions,))
    loss_of(way, hidden[:64], weight, labels[:64]).backward()
    before, began = peak_mib("VmRSS"), time.perf_counter()
    hidden.grad = weight.grad = None
    loss = loss_of(way, hidden, weight, labels)
    loss.backward()
    seconds = time.perf_counter() - began
    probes = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) for part in (weight, hidden)]
    sums = [float((part.grad * probe).sum()) for part, probe in zip((weight, hidden), probes, strict=True)]
    print(json.dumps({"seconds": seconds, "mib": peak_mib("VmHWM") - before, "loss": float(loss.detach()),
                      "sums": sums}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        return run(given.way, given.positions, given.vocabulary, given.width)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    sizes = [f"--{name}={getattr(given, name)}" for name in ("positions", "vocabulary", "width")]
    for _ in range(given.pairs):
        for way in WAYS:
            command = [sys.executable, __file__, *sizes, f"--way={way}"]
            output = subprocess.run(command, capture_output=True, text=True, check=False)
            if output.returncode:
                print(f"{way}: {output.stderr.strip().splitlines()[-1:]}")
                continue
            found[way].append(json.loads(output.stdout))
    reference = found["at_once"][0]
    print(f"{given.positions} positions x {given.vocabulary} words, width {given.width}, medians of {given.pairs}")
    for way, runs in found.items():
        if not runs:
            continue
        off = abs(runs[0]["loss"] - reference["loss"]) / reference["loss"]
        worst = max(abs(mine / other - 1) for mine, other in zip(runs[0]["sums"], reference["sums"], strict=True))
        seconds = [statistics.median(one["seconds"] for one in some) for some in (runs, found["at_once"])]
        mib = [statistics.median(one["mib"] for one in some) for some in (runs, found["at_once"])]
        time_of = f"{seconds[0]:6.2f} s ({seconds[0] / seconds[1]:.2f})"
        memory = f"{mib[0]:8.0f} MiB ({mib[1] / mib[0]:.1f} times less)"
        print(f"{way:>22}: {time_of}, {memory}, loss off by {off:.1e}, gradients by {worst:.1e}")
    return None


if __name__ == "__main__":
    main()
