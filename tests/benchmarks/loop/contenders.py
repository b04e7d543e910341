"""Who is compared in `bench_loop.py`, each one rank of two: CPU seconds and tokens of each step, losses as far as the
contender tells them."""

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

RANKS, LENGTH, ROWS, MICRO = 2, 256, 16, 4
"""Rows a step; sequences a micro-batch and rank."""
WIDTHS = {"hidden_size": 192, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 6,
          "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip


def make_job(folder: Path, kind: str, steps: int) -> Any:
    """A job over rows of full length, or over documents, packed or not; its shards are written once."""
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
    (folder / kind).mkdir(exist_ok=True)
    rows = [{"text": text} for text in texts(kind, steps)]
    job = tiny_job(
        folder / kind, model, "pretrain", rows[:1] * 2,
        data={"max_length": LENGTH, "packing": packed, "overlong": "truncate"},
        train={"global_batch_size": ROWS, "micro_batch_size": MICRO, "steps": steps, "learning_rate": 1e-4,
               "schedule": "constant", "weight_decay": 0.0, "verify": False, "deepspeed": "zero3"},
        checkpoint={"every_steps": 10**6},
    )  # fmt: skip
    write_rows(Path(job.data.train_paths[0]), rows)
    job = with_packing(job, decide_packing(job, ModelFolder(str(model), ""))) if packed else job
    if fresh:
        shard_locally(job)
    return job


def texts(kind: str, steps: int) -> list[str]:
    """Letters, a token each."""
    draw = np.random.default_rng(0)
    count = ROWS * steps * (3 if kind == "packed" else 1)
    lengths = np.full(count, 2 * LENGTH) if kind == "full" else draw.lognormal(np.log(LENGTH / 3), 0.7, count)
    return [bytes(draw.integers(97, 123, int(each), np.uint8)).decode() for each in lengths.clip(16, 2 * LENGTH)]


class Enough(Exception):
    """All steps are done; what a run does after them is not measured."""


def ours(job: Any, asked: argparse.Namespace) -> tuple[list[float], list[int], list[float]]:
    """The product's own rank."""
    from tests.trainers.training.test_training import Recorder
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    marks: list[float] = []

    class Clock(Recorder):
        def at(self, phase: Any, step: int) -> None:
            super().at(phase, step)
            if phase == "data":
                marks.append(time.process_time())
            elif phase == "save" and step == asked.steps:
                marks.append(time.process_time())
                raise Enough

    clock = Clock()
    with contextlib.suppress(Enough):
        run_rank(find_run(job), clock)
    steps = [event for event in clock.events if event.kind == "step"]
    return marks, np.diff([0, *(event.tokens for event in steps)]).tolist(), [event.loss for event in steps]


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


def configuration(job: Any) -> dict[str, Any]:
    """As our engine has it."""
    from trainers.batching.batch_plan import plan_batches
    from trainers.model.deepspeed_config import derive_config

    return derive_config(job, plan_batches(ROWS, MICRO, RANKS, LENGTH))


def by_hand(job: Any, _: argparse.Namespace) -> tuple[list[float], list[int], list[float]]:
    """A DeepSpeed loop as everybody writes it."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.model.engine import partitioned_on_load
    from trainers.model.zero_settings import with_settings

    rank, per_rank = int(os.environ["RANK"]), ROWS // RANKS
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed(verbose=False)
    config = configuration(job)
    with partitioned_on_load(config):
        model: Any = AutoModelForCausalLM.from_pretrained(job.model.path).train()
    config = with_settings(config, model, RANKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    steps, losses = batches(job), []
    marks = [time.process_time()]
    for rows in steps:
        total = torch.zeros(())
        for part in torch.stack(rows[rank * per_rank : (rank + 1) * per_rank]).split(MICRO):
            loss = engine(input_ids=part, labels=part, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(float(total) * MICRO / ROWS)
        marks.append(time.process_time())
    return marks, [sum(map(len, rows)) for rows in steps], losses
