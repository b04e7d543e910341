"""A pack's forward and backward pass by the bounds of its documents, beside the dense mask that transformers makes.

python tests/benchmarks/bench_packs.py [--length 4096] [--documents 1 8 32] [--rounds 5] [--threads 1]

One Llama (6 layers, width 384, fp32), one pack a pass; the two take turns. Loss and gradients are compared first.
Seconds are those of the CPU, so a busy machine does not count.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import trainers.architecture.document_attention  # noqa: F401  # known to transformers from then on
from trainers.tasks import Example, TaskOptions, load_task

BACKENDS = ("documents", "sdpa")
VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, task = make_model(asked.length), load_task("pretrain", TaskOptions(packing=True))
    print(
        f"| documents in {asked.length} tokens | by bounds, s | dense mask, s | ratio |\n| ---: | ---: | ---: | ---: |"
    )
    for count in asked.documents:
        inputs, labels = make_pack(task, asked.length, count)
        compare(model, task, inputs, labels)
        seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for _ in range(asked.rounds):
            for backend in BACKENDS:
                model.set_attn_implementation(backend)
                began = time.process_time()
                task.step_loss(model, inputs, labels).backward()
                seconds[backend].append(time.process_time() - began)
                model.zero_grad()
        ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        ours, theirs = (statistics.median(times) for times in seconds.values())
        print(f"| {count} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)


def make_model(length: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
                    num_key_value_heads=2, intermediate_size=1024, max_position_embeddings=length)
    )  # fmt: skip


def make_pack(task: Any, length: int, count: int) -> tuple[Any, Any]:
    """Documents of equal length, and of what is left over."""
    draw = np.random.default_rng(0)
    sizes = [length // count] * count
    rows = [Example(at, draw.integers(4, VOCABULARY, size).astype(np.int32), {}) for at, size in enumerate(sizes)]
    inputs, labels = task.collate([rows], 0).to("cpu")
    return inputs, labels


def compare(model: Any, task: Any, inputs: Any, labels: Any) -> None:
    """Raise where the two backends do not compute the same."""
    found = []
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        loss = task.step_loss(model, inputs, labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


if __name__ == "__main__":
    main()
