"""What the plan counts for jobs whose GPU memory others have published. Calculated: nothing runs on a GPU here.

python tests/benchmarks/memory/bench_published.py

torchtitan: benchmarks/llama3_h100_202412_torchtitan.md of pytorch/torchtitan, table 1; its memory is what the allocator
reserved. Its selective activation checkpointing (every second matrix product and the attention are kept) is no setting
of ours; the same policy is put around the layers here, and their kept tensors are counted as ours are.
DeepSpeed: training/bf16_master_weight of deepspeedai/DeepSpeedExamples, peak of allocated memory on 4 GPUs. States in
bf16 are no setting of ours; the second figure is the same count with states of two bytes.
"""

import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.conftest import make_chat_tokenizer
from tests.tiny import tiny_job
from trainers.model.memory import GIB, MARGIN, ModelSize, Need, StepShape, needs
from trainers.model.model_size import Live, _give_storage, _inputs, _without_logits, build, measure_size
from trainers.tasks import load_task, task_options

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}  # fmt: skip
PLAIN_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 10_923, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 50_257, "max_position_embeddings": 512}  # fmt: skip


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
            _give_storage(model)
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


if __name__ == "__main__":
    main()
