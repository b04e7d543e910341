"""What kernels kept for the shapes of 16-bit products hold on a CPU, and what making them again costs.

python tests/benchmarks/memory/bench_kernels.py

A Llama of 4 layers in bf16 computes losses and gradients of 2 x 256 tokens, and of 2 rows of 64 to 448; as ranks keep
kernels (`world.KERNELS_KEPT`), and as torch does. Processes of one thread, one after the other; the median of rounds.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from trainers.model.world import KERNEL_CACHES, KERNELS_KEPT, pick_device

MIB, STEPS, WARM, ROUNDS, TOKENS = 2**20, 40, 5, 3, 256


def train(varied: bool) -> None:
    """Print CPU seconds per 256 tokens of a row, and by how much the process grew from its first step."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainers.host_memory import give_freed_memory_back
    from trainers.model.memory import GIVE_BACK_BYTES

    pick_device(0, 1)
    give_freed_memory_back(GIVE_BACK_BYTES)
    torch.manual_seed(0)
    random.seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=768, num_hidden_layers=4, intermediate_size=3072, vocab_size=8192,
                                         num_attention_heads=8, num_key_value_heads=4)).bfloat16()  # fmt: skip
    took, held = [], []
    for _ in range(STEPS):
        length = random.randrange(64, 448) if varied else TOKENS
        rows = torch.randint(0, 8192, (2, length))
        began = time.process_time()
        model(input_ids=rows, labels=rows).loss.backward()
        model.zero_grad(set_to_none=False)
        took.append((time.process_time() - began) * TOKENS / length)
        held.append(psutil.Process().memory_info().rss)
    print(json.dumps([statistics.median(took[WARM:]), held[-1] - held[0]]))


def measure(varied: bool, kept: int) -> tuple[float, float]:
    environment = {**os.environ, **dict.fromkeys(KERNEL_CACHES, str(kept))}
    told = subprocess.run([sys.executable, __file__, "varied" if varied else "same"], env=environment, check=True,
                          capture_output=True, text=True).stdout  # fmt: skip
    seconds, grown = json.loads(told.splitlines()[-1])
    return seconds, grown / MIB


def main() -> None:
    print("| rows | kernels kept | CPU s per 256 tokens | grown by MiB |\n| --- | ---: | ---: | ---: |")
    for varied in (False, True):
        found: dict[int, list[tuple[float, float]]] = {kept: [] for kept in (KERNELS_KEPT, 1024)}
        for _ in range(ROUNDS):
            for kept, results in found.items():
                results.append(measure(varied, kept))
        for kept, results in found.items():
            seconds, grown = (statistics.median(each) for each in zip(*results, strict=True))
            rows = "64 to 448 tokens" if varied else "256 tokens"
            print(f"| {rows} | {kept:,} | {seconds:.3f} | {grown:,.0f} |", flush=True)


if __name__ == "__main__":
    train(sys.argv[1] == "varied") if len(sys.argv) > 1 else main()
