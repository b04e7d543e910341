"""What the plan counts for jobs whose GPU memory others have published. Calculated: nothing runs on a GPU here.

python tests/benchmarks/memory/bench_published.py

torchtitan: benchmarks/llama3_h100_202412_torchtitan.md of pytorch/torchtitan, table 1; its memory is what the allocator
reserved. Its selective activation checkpointing (every second matrix product and the attention are kept) is no setting
of ours; the same policy is put around the layers here, and their kept tensors are counted as ours are.
DeepSpeed: training/bf16_master_weight of deepspeedai/DeepSpeedExamples, peak of allocated memory on 4 GPUs. States in
bf16 are no setting of ours; the second figure is the same count with states of two bytes.
Arctic Long Sequence Training (arXiv:2506.13996): recipes run-h100-* and run-h200-* in projects/sequence-parallelism of
snowflakedb/ArcticTraining, whose comments say what a GPU held with Llama 3.1 8B, one sequence, every layer computed
again, weights and optimizer in host memory. They ran FlashAttention and Liger's kernels, some an MLP in tiles and a
sequence over several GPUs (Ulysses). Liger's norms and MLP are none of ours, so `fused_layers.py` puts what these hold
around the layers. The last table counts the layers and settings that Tuneyard trains with.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.benchmarks.memory.fused_layers import fused
from tests.conftest import make_chat_tokenizer
from tests.tiny import tiny_job
from trainers.model.memory import GIB, MARGIN, RESERVE_BYTES, ModelSize, Need, StepShape, needs
from trainers.model.model_size import Live, _inputs, _without_logits, build, give_storage, measure_size
from trainers.tasks import load_task, task_options

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}  # fmt: skip
PLAIN_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 10_923, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 50_257, "max_position_embeddings": 512}  # fmt: skip
H100_GIB = 81_559 / 1024
VOCABULARY = LLAMA_8B["vocab_size"]


@dataclass(frozen=True)
class Recipe:
    """One of Arctic's."""

    name: str
    tokens: int
    """Of the sequence."""
    gib: float | None
    """That the GPU held; None where only that it ran is known."""
    liger: bool = True
    offload: bool = False
    """Of what the layers keep."""
    tiled: bool = False
    workers: int = 1
    ulysses: bool = False
    """Whether the workers share the sequence; several have their part of the weights on the GPU."""


RECIPES = (
    Recipe("H100, transformers' loss and layers", 32_000, 71.91, liger=False),
    Recipe("H200, the same", 65_000, 137.36, liger=False),
    Recipe("H200, Liger: loss in chunks, fused norms and MLP", 300_000, 134.96),
    Recipe("H200, the same, kept activations in host memory", 650_000, 126.81, offload=True),
    Recipe("H200, the same, MLP in tiles", 1_200_000, 136.15, offload=True, tiled=True),
    Recipe("H100, transformers' loss and layers: close to out of memory", 36_000, None, liger=False),
    Recipe("8 H100, the same", 32_000, None, liger=False, workers=8),
    Recipe("8 H100, Liger", 160_000, None, workers=8),
    Recipe("H100, all of it", 500_000, None, offload=True, tiled=True),
    Recipe("8 H100, all of it, and Ulysses", 3_700_000, None, True, True, True, 8, True),
    Recipe("32 H100, all of it, and Ulysses", 15_000_000, None, True, True, True, 32, True),
)


def make_job(folder: Path, length: int, **config: Any) -> Any:
    from transformers import LlamaConfig

    shutil.rmtree(folder, ignore_errors=True)
    LlamaConfig(**config).save_pretrained(folder / "model")
    make_chat_tokenizer(folder / "model")
    job = tiny_job(folder, folder / "model", "pretrain", [{"text": "a"}] * 5, data={"max_length": length})
    return job.model_copy(update={"model": job.model.model_copy(update={"dtype": "bfloat16"})})


def kept_selectively(job: Any, length: int) -> int:
    """What a layer keeps of one sequence under torchtitan's policy."""
    task = load_task(job.task, task_options(job))
    held = []
    for layers in (1, 2):
        model = build(job, task, job.model.path, layers)
        with FakeTensorMode():
            give_storage(model)
            for layer in model.model.layers:
                contexts = partial(create_selective_checkpoint_contexts, Policy())
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
            with _without_logits(model, True), Live() as live:
                output = model(**_inputs(model, length), use_cache=False)
                held.append(live.now)
            del output
    return held[1] - held[0]


class Policy:
    """Keep the attention's output and every other matrix product."""

    def __init__(self) -> None:
        self.products: Counter[bool] = Counter()

    def __call__(self, context: Any, operator: Any, *_: Any, **__: Any) -> Any:
        kept = "scaled_dot_product" in str(operator)
        if operator == torch.ops.aten.mm.default:
            self.products[context.is_recompute] += 1
            kept = self.products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def zero3(size: ModelSize, workers: int, step: StepShape) -> Need:
    return next(need for need in needs(size, workers, step) if need.way == "zero3")


def card_bytes(place: Path, recipe: Recipe, tokens: int) -> int:
    """What a GPU is said to hold with a recipe and a sequence of so many tokens."""
    local = tokens // (recipe.workers if recipe.ulysses else 1)
    job = make_job(place / "alst", local, **{**LLAMA_8B, "max_position_embeddings": local})
    with fused(recipe.liger, recipe.tiled, recipe.workers if recipe.ulysses else 1):
        size = replace(measure_size(job, job.model.path), chunked=recipe.liger)
    way = "zero3" if recipe.workers > 1 else "zero3-cpu-offload"
    found = needs(size, recipe.workers, StepShape(1, 1, 1, recipe.offload))
    need = next(need for need in found if need.way == way)
    counted = need.counted - need.optimizer  # that is in host memory throughout
    if not recipe.liger:
        counted += local * VOCABULARY * size.weight_bytes  # transformers gives the logits back beside the loss
    return int(counted * (1 + MARGIN)) + RESERVE_BYTES


def own_bytes(place: Path, recipe: Recipe, tokens: int) -> int:
    """The same with Tuneyard's own layers and settings: sequences shared, feed-forward layers in tiles, what layers
    keep in host memory."""
    job = make_job(place / "own", 1024, **{**LLAMA_8B, "max_position_embeddings": tokens})
    data, train = {"max_length": tokens}, {"sequence_parallel": recipe.workers}
    job = job.model_copy(update={"data": job.data.model_copy(update=data), "train": job.train.model_copy(update=train)})
    found = needs(measure_size(job, job.model.path), recipe.workers, StepShape(1, 1, 1, offload=True, tiled=True))
    return next(need for need in found if need.way == "zero3-cpu-offload").device


def longest(place: Path, recipe: Recipe, count: Callable[[Path, Recipe, int], int] = card_bytes) -> float:
    """Tokens of the longest sequence that is said to fit an H100: all that grows with it grows in proportion."""
    some, more = (count(place, recipe, tokens) for tokens in (recipe.tokens // 2, recipe.tokens))
    each = (more - some) / (recipe.tokens - recipe.tokens // 2)
    return recipe.tokens + (H100_GIB * GIB - more) / each


def alst(place: Path) -> None:
    """Three tables: memory at a length, and the longest sequence, of theirs and of ours."""
    print("\n| Llama 3.1 8B with Arctic's recipes | tokens | GiB | calculated | off |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for recipe in RECIPES:
        if recipe.gib is not None:
            said = card_bytes(place, recipe, recipe.tokens) / GIB
            print(
                f"| {recipe.name} | {recipe.tokens:,} | {recipe.gib:.1f} | {said:.1f} | {said / recipe.gib - 1:+.1%} |"
            )
    print("\n| the same | tokens that ran | calculated GiB of 79.6 | longest that is said to fit |")
    print("| --- | ---: | ---: | ---: |")
    for recipe in RECIPES:
        if recipe.gib is None:
            said = card_bytes(place, recipe, recipe.tokens) / GIB
            print(f"| {recipe.name} | {recipe.tokens:,} | {said:.1f} | {longest(place, recipe):,.0f} |", flush=True)
    print("\n| with Tuneyard's own layers and settings | tokens | calculated GiB of 79.6 | longest said to fit |")
    print("| --- | ---: | ---: | ---: |")
    for recipe in RECIPES[-3:]:
        said, most = own_bytes(place, recipe, recipe.tokens) / GIB, longest(place, recipe, own_bytes)
        print(f"| {recipe.workers} H100 | {recipe.tokens:,} | {said:.1f} | {most:,.0f} |", flush=True)


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as place:
        job = make_job(Path(place) / "8b", 8192, **LLAMA_8B)
        size, layer = measure_size(job, job.model.path), kept_selectively(job, 8192)
        size = replace(size, chunked=False, sequence_bytes=size.outside_bytes + layer * size.layers)
        said = zero3(size, 8, StepShape(2)).counted * (1 + MARGIN) / GIB
        lines += [("torchtitan, Llama 3.1 8B, 8 H100, 2 x 8,192 tokens, FSDP", 82.4, said),
                  ("the same, compiled", 77.0, said)]  # fmt: skip
        job = make_job(Path(place) / "7b", 512, **PLAIN_7B)
        size = replace(measure_size(job, job.model.path), chunked=False)
        need = zero3(size, 4, StepShape(1, 1, 1))
        narrow = size.trainable // 4 * 6 + 2 * min(10**9, size.trainable // 4)
        wide = need.optimizer + 6 * min(10**9, size.trainable // 4)
        lines += [(f"DeepSpeed, {size.parameters / 1e9:.2f} billion, 4 GPUs, ZeRO-3, 512 tokens, layers again", 31.38,
                   need.counted / GIB),
                  ("the same with states in bf16", 18.93, (need.counted - wide + narrow) / GIB)]  # fmt: skip
    print("| published | GiB | calculated | off |\n| --- | ---: | ---: | ---: |")
    for name, theirs, ours in lines:
        print(f"| {name} | {theirs:.1f} | {ours:.1f} | {ours / theirs - 1:+.1%} |")
    with tempfile.TemporaryDirectory() as place:
        alst(Path(place))


if __name__ == "__main__":
    main()
