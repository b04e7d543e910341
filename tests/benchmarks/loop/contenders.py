"""The product's own rank and a DeepSpeed loop by hand, as they are compared in `bench_loop.py`; the job of both."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.loop.turns import Turns

RANKS, LENGTH = 2, 256
SHAPES = {"full": (8, 2), "documents": (32, 8), "packed": (32, 8)}
"""Sequences a step, and a micro-batch and rank. Of documents eight a micro-batch: padded in the order in which they
come, about half of its positions are padding; with two it is a quarter."""
WIDTHS = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 8192}  # fmt: skip
RATE = 1e-4


def make_job(folder: Path, kind: str, steps: int, lengths: list[int]) -> Any:
    """A job over rows of full length, or over documents, packed or not; its shards are written once.

    Args:
        kind: full, documents or packed.
        lengths: of documents, in tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import make_chat_tokenizer
    from tests.tiny import shard_locally, tiny_job, write_rows
    from trainers.model.source import ModelFolder
    from trainers.verification.packing import decide_packing, with_packing

    model, packed = folder / "model", kind == "packed"
    if not model.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**WIDTHS)).save_pretrained(model)
        make_chat_tokenizer(model)
    fresh = not (folder / kind).exists()
    count, micro = SHAPES[kind]
    (folder / kind).mkdir(exist_ok=True)
    rows = [{"text": text} for text in texts(kind, steps, lengths)]
    job = tiny_job(
        folder / kind, model, "pretrain", rows[:1] * 2,
        data={"max_length": LENGTH, "packing": packed, "overlong": "truncate"},
        train={"global_batch_size": count, "micro_batch_size": micro, "steps": steps, "learning_rate": RATE,
               "schedule": "constant", "weight_decay": 0.0, "verify": False, "deepspeed": "zero3"},
        checkpoint={"every_steps": 10**6},
    )  # fmt: skip
    write_rows(Path(job.data.train_paths[0]), rows)
    job = with_packing(job, decide_packing(job, ModelFolder(str(model), ""))) if packed else job
    if fresh:
        shard_locally(job)
    return job


def texts(kind: str, steps: int, lengths: list[int]) -> list[str]:
    """Letters, a token each."""
    draw = np.random.default_rng(0)
    count = SHAPES[kind][0] * steps * (4 if kind == "packed" else 1)
    wanted = np.full(count, 2 * LENGTH) if kind == "full" else draw.choice(lengths, count)
    return [bytes(draw.integers(97, 123, int(each), np.uint8)).decode() for each in wanted.clip(16, 2 * LENGTH)]


class Enough(Exception):
    """All steps are done; what a run does after them is not measured."""


def ours(job: Any, turns: Turns) -> None:
    """The product's own rank, with its events, heartbeat and sampler of stragglers."""
    from tests.trainers.training.test_training import Recorder
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    class Clock(Recorder):
        def at(self, phase: Any, step: int) -> None:
            super().at(phase, step)
            if phase not in ("data", "save"):
                return
            steps = [0] + [event.tokens for event in self.events if event.kind == "step"]
            if len(steps) == 2:
                turns.first = next(event.loss for event in self.events if event.kind == "step")
            turns.next(steps[-1] - steps[-2] if len(steps) > 1 else 0)
            if phase == "save":
                raise Enough

    run_rank(find_run(job), Clock())


def batches(job: Any) -> list[list[Any]]:
    """Token ids of the rows of each step, in our order."""
    import torch

    from tests.peer import ordered
    from trainers.batching.order import job_order
    from trainers.batching.packing import index_packs
    from trainers.run.record import find_run

    run = find_run(job)
    rows = run.open_shards("train", run.load_task())
    packs = index_packs(job, rows)
    lines = ordered(job_order(job, len(packs)), packs, rows)
    return [[torch.from_numpy(np.array(row.input_ids, np.int64)) for row in step] for _, step in lines]


def shape_of(job: Any) -> tuple[int, int]:
    """Sequences a step, and a micro-batch and rank."""
    return job.train.global_batch_size, job.train.micro_batch_size


def padding_share(job: Any) -> float:
    """Of the positions that rows have which are padded to the longest of each micro-batch as they come."""
    lengths = np.array([[len(row) for row in step] for step in batches(job)]).reshape(-1, shape_of(job)[1])
    return float(1 - lengths.sum() / (lengths.max(1) * lengths.shape[1]).sum())


def configuration(job: Any) -> dict[str, Any]:
    """DeepSpeed's, as our engine has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainers.batching.batch_plan import plan_batches
    from trainers.model.deepspeed_config import derive_config
    from trainers.model.zero_settings import with_settings

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model.path))
    return with_settings(derive_config(job, plan_batches(*shape_of(job), RANKS, LENGTH)), model, RANKS)


def join() -> None:
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as our ranks do
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(verbose=False)


def by_hand(job: Any, turns: Turns) -> None:
    """A DeepSpeed loop as everybody writes it, over rows of full length."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.model.engine import partitioned_on_load

    rank, (count, micro) = int(os.environ["RANK"]), shape_of(job)
    per_rank = count // RANKS
    join()
    config = configuration(job)
    with partitioned_on_load(config):
        model: Any = AutoModelForCausalLM.from_pretrained(job.model.path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    turns.next(0)
    for rows in batches(job):
        mine, total = torch.stack(rows[rank * per_rank : (rank + 1) * per_rank]), torch.zeros(())
        for part in mine.split(micro):
            loss = engine(input_ids=part, labels=part, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        turns.first = turns.first or float(total) * micro / count
        turns.next(mine.numel())
