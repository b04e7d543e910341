"""How a step is cut into micro-batches: by length, dealt to ranks in turn, every sequence once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import load_written, shard_locally, tiny_job
from trainers.batching.batch_plan import BatchPlan
from trainers.batching.batches import StepSource
from trainers.batching.order import Order
from trainers.batching.packing import index_packs
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder

RANKS, MICRO, ROUNDS = 2, 2, 2
GLOBAL = RANKS * MICRO * ROUNDS


@pytest.fixture
def sources(tmp_path: Path, tiny_chat_tokenizer: Path) -> list[StepSource]:
    """Of each rank, over 13 rows of different lengths: the second step holds 5."""
    draw = np.random.default_rng(0)
    rows = [
        {"text": bytes(draw.integers(97, 123, size, np.uint8)).decode()} for size in draw.permutation(range(9, 57, 3))
    ]
    job = tiny_job(tmp_path, tiny_chat_tokenizer, "pretrain", rows, data={"packing": False})
    shard_locally(job)
    written = load_written(job).train
    task = job_task(job, written)
    shards = ShardSet(shards_folder(Folder(job.storage), written.key), written, task)
    order, plan = Order(13, GLOBAL, 13, 0), BatchPlan(GLOBAL, RANKS, MICRO, ROUNDS)
    return [StepSource(shards, index_packs(job, shards), order, plan, rank, task, 0) for rank in range(RANKS)]


def lengths(batch: Any) -> list[int]:
    """Of a micro-batch's sequences that count."""
    return [int(each) for each in (batch.segments >= 0).sum(1)] if len(batch.rows) else []


def test_micro_batches_go_from_the_longest_to_the_shortest_and_ranks_hold_neighbours(
    sources: list[StepSource],
) -> None:
    steps = [source.next(0).micro_batches for source in sources]
    dealt = [length for turn in range(ROUNDS) for rank in range(RANKS) for length in lengths(steps[rank][turn])]
    assert len(dealt) == GLOBAL
    assert dealt == sorted(dealt, reverse=True)


def test_a_short_step_holds_each_sequence_once_and_fills_up_without_targets(sources: list[StepSource]) -> None:
    batches = [source.next(1) for source in sources]
    micro = [each for batch in batches for each in batch.micro_batches]
    assert [len(batch.micro_batches) for batch in batches] == [ROUNDS] * RANKS
    rows = [int(row) for each in micro for row in each.rows]
    assert sorted(rows) == sorted(int(row) for row in Order(13, GLOBAL, 13, 0).step(1))
    assert sum(int((each.labels >= 0).sum()) for each in micro) == batches[0].targets
    filler = [each for each in micro if not len(each.rows)]
    assert [each.labels.max() for each in filler] == [-100]
    assert filler[0].labels.shape[1] == min(length for each in micro for length in lengths(each))
