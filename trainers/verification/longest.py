"""Before the first step: do the longest rows fit? Else a step far on would be the first to find out.

Every rank takes one micro-batch of them forward as training does; where nothing is partitioned, backward too.
"""

import traceback
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainers.architecture import plain_model, positions
from trainers.architecture.layer_drop import seed_layer_drop
from trainers.batching.packing import PackIndex
from trainers.errors import PASSING, TrainingError, TuneyardError
from trainers.host_memory import memory_available
from trainers.known_masks import masks_known
from trainers.model.plain_engine import PlainEngine
from trainers.model.world import World
from trainers.model.zero_passes import beside_training
from trainers.shards.dataset import ShardSet
from trainers.tasks import Example, Task
from trainers.training import loop
from trainers.training.hooks import Objective
from trainers.training.straggler import in_collective

Packs = list[list[Example]]


def longest_packs(shards: ShardSet, packs: PackIndex, count: int) -> Packs:
    """The packs with the most tokens, as a micro-batch holds so many; of equally long ones those of more documents."""
    order = np.lexsort((-np.diff(packs.offsets), -packs.sums(shards.lengths)))
    return rows_of(shards, packs, order[:count])


def rows_of(shards: ShardSet, packs: PackIndex, chosen: Iterable[int]) -> Packs:
    return [[shards.row(int(row)) for row in packs.pack(int(index))] for index in chosen]


def check_longest(
    engine: Any,
    objective: Objective,
    task: Task,
    shards: ShardSet,
    packs: PackIndex,
    micro_batch_size: int,
    pad_id: int,
    world: World,
) -> None:
    """Take the longest rows, and those of the most targets, which may be long in another way. Every rank calls this
    with the same shards; the engine's weights stay as they are.

    Raises:
        TrainingError: where the model or the memory of a rank cannot take them.
    """
    longest = longest_packs(shards, packs, micro_batch_size)
    most = rows_of(shards, packs, [int(np.argmax(packs.sums(shards.targets)))])
    batches = [[*longest[: micro_batch_size - 1], *most]] if len(longest) > 1 else [longest, most]
    loop.seed_step(0, 0, world.rank)
    seed_layer_drop(engine, 0, 0)  # or ranks would leave out different layers
    for rows in batches:
        try:
            with beside_training(engine):
                _take(engine, objective, task, rows, pad_id, world)
        except Exception as error:  # of whatever kind a model's code raises
            if isinstance(error, TuneyardError) or not _is_of_the_rows(error):
                raise
            raise TrainingError(_message(engine, rows, error, world)) from error


def _take(engine: Any, objective: Objective, task: Task, rows: Packs, pad_id: int, world: World) -> None:
    batch = task.collate(rows, pad_id, 1).part_of(world.group)
    with masks_known(batch.mask_facts()):
        loss = objective.step_loss(engine, *batch.to(world.device), batch.targets(world.device))
    if isinstance(engine, PlainEngine):
        engine.backward(loss)
        engine.optimizer.zero_grad(set_to_none=True)
    float(loss.detach())  # what a GPU refuses, it says when it is waited for


def _is_of_the_rows(error: Exception) -> bool:
    """Whether the rows are what failed: neither a peer that is gone, nor the GPU."""
    frames = [(frame.filename, frame.name) for frame in reversed(traceback.extract_tb(error.__traceback__))]
    text = str(error)
    return not in_collective(frames) and ("CUDA error" not in text or "device-side assert" in text)


def _message(engine: Any, rows: Packs, error: Exception, world: World) -> str:
    tokens = max(sum(len(row.input_ids) for row in pack) for pack in rows)
    first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    shape = f"a micro-batch of the longest training rows ({len(rows)} of up to {tokens} tokens) ended with {first}"
    if isinstance(error, MemoryError) or PASSING.search(str(error)):
        return (
            f"{shape}; {_free_gib(world):.1f} GiB of memory are free. Lower train.micro_batch_size or data.max_length, "
            "set train.activation_checkpointing, or use more workers"
        )
    most = positions(plain_model(engine).config)
    said = f"; the model has {most} positions" if most else ""
    return f"{shape}{said}. Lower data.max_length or take a model for longer texts"


def _free_gib(world: World) -> float:
    import torch

    on_card = world.device.type == "cuda"
    return (torch.cuda.mem_get_info(world.device)[0] if on_card else memory_available()) / 2**30
