"""Two ranks that share a sequence (`train.sequence_parallel`), beside DeepSpeed's Ulysses and a rank that has it whole.

python tests/benchmarks/bench_sharing.py [--length 4096] [--rounds 5]

One Llama (6 layers, width 384, fp32), one document a row, forward and backward, one thread a rank; the three take
turns. Losses and gradients are compared first. Seconds are CPU seconds of the slower rank for one row, so what a rank
waits for the other does not count; where each has rows whole, two rows take as long as one, and half of it counts.
Bytes are those that the forward pass keeps for the backward pass on a rank.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.ranks import run_ranks

RANKS = 2
NAMES = ("whole", "shared", "DeepSpeed's Ulysses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    ranks = run_ranks(measure, RANKS, asked.length, asked.rounds, patience_s=3600.0)
    print(f"| a row of {asked.length} tokens, two ranks | CPU s a rank | of whole | kept MiB a rank |")
    print("| --- | ---: | ---: | ---: |")
    seconds = {name: [max(times) / (RANKS if name == "whole" else 1) for times in
                      zip(*(rank[name][0] for rank in ranks), strict=True)] for name in NAMES}  # fmt: skip
    for name in NAMES:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["whole"], strict=True))
        # a whole row lies on one rank, so for the same number of rows it has twice as many bytes a row
        kept = max(rank[name][1] for rank in ranks) / 2**20
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio:.2f} | {kept:,.0f} |")


def measure(length: int, rounds: int) -> dict[str, tuple[list[float], int]]:
    """On one rank: seconds of each round and bytes kept, by contender."""
    import torch
    import torch.distributed as dist

    from trainers.model.world import join_world
    from trainers.tasks import load_task
    from trainers.tasks.options import TaskOptions

    world = join_world(1, 0, RANKS)
    model, task = make_model(length), load_task("pretrain", TaskOptions(packing=True))
    steps = contenders(model, task, length, world.group)
    gradients = []
    for name, loss_of in steps.items():
        loss_of().backward()
        found = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        for gradient in found if name != "whole" else ():
            dist.all_reduce(gradient)
        gradients.append(found)
    for other in gradients[1:]:
        for ours, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5 * float(ours.abs().max()) + 1e-7)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, loss_of in steps.items():
            dist.barrier()
            began = time.thread_time()
            loss_of().backward()
            taken[name].append(time.thread_time() - began)
            model.zero_grad()
    return {name: (taken[name], kept_bytes(model, loss_of)) for name, loss_of in steps.items()}


def contenders(model: Any, task: Any, length: int, group: Any) -> dict[str, Callable[[], Any]]:
    """What gives the loss of a row, or of this rank's part of it."""
    import numpy as np
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import trainers.architecture.document_attention  # noqa: F401  # known to transformers from then on
    from trainers.tasks import Example

    ids = np.random.default_rng(0).integers(0, 4096, length).astype(np.int32)
    whole = task.collate([[Example(0, ids, {})]], 0)
    part = whole.part(group.place, group.size)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.set_attn_implementation("sdpa")
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", RANKS, 1, seq_length_is_variable=True)
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = plain

    def ours(batch: Any) -> Any:
        model.set_attn_implementation("documents")
        return task.step_loss(model, *batch.to("cpu"), batch.targets("cpu"))

    def peer() -> Any:
        inputs, labels = part.to("cpu")
        model.set_attn_implementation("sdpa")
        ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
        try:
            logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        return task.loss_sum(logits, labels, part.targets("cpu"))

    torch.manual_seed(0)
    return dict(zip(NAMES, (lambda: ours(whole), lambda: ours(part), peer), strict=True))


def kept_bytes(model: Any, loss_of: Callable[[], Any]) -> int:
    import torch

    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    del loss
    return sum(kept.values())


def make_model(length: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
                    num_key_value_heads=2, intermediate_size=1024, max_position_embeddings=length)
    )  # fmt: skip


if __name__ == "__main__":
    main()
