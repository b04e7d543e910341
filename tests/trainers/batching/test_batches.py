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


def sources_of(
    folder: Path, tokenizer: Path, characters: list[int], order: Order, padded_to: int = 0, overhead: float = 0.0
) -> list[StepSource]:
    """Of each rank, over rows of so many characters."""
    draw = np.random.default_rng(0)
    rows = [{"text": bytes(draw.integers(97, 123, size, np.uint8)).decode()} for size in draw.permutation(characters)]
    job = tiny_job(folder, tokenizer, "pretrain", rows, data={"packing": False})
    shard_locally(job)
    written = load_written(job).train
    task = job_task(job, written)
    task.options = task.options.model_copy(update={"pack_length": padded_to})
    shards = ShardSet(shards_folder(Folder(job.storage), written.key), written, task)
    packs, plan = index_packs(job, shards), BatchPlan(GLOBAL, RANKS, MICRO, ROUNDS)
    return [StepSource(shards, packs, order, plan, rank, task, 0, overhead) for rank in range(RANKS)]


@pytest.fixture
def sources(tmp_path: Path, tiny_chat_tokenizer: Path) -> list[StepSource]:
    """Over 13 rows of different lengths: the third step holds 1."""
    return sources_of(tmp_path, tiny_chat_tokenizer, list(range(9, 57, 3)), Order(13, GLOBAL, 17, 0))


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


@pytest.mark.parametrize("padded_to", [0, 64])
def test_short_rows_go_together_unless_each_is_padded_to_one_length(
    tmp_path: Path, tiny_chat_tokenizer: Path, padded_to: int
) -> None:
    """A micro-batch holds two long rows or many short ones; where layers are compiled all rows are long."""
    rows, order = [50] * 4 + [9] * 12, Order(13, GLOBAL, 16, 0)
    sources = sources_of(tmp_path, tiny_chat_tokenizer, rows, order, padded_to, overhead=100.0)
    sizes = []
    for step in range(order.steps):
        found = [len(micro.rows) for source in sources for micro in source.next(step).micro_batches]
        assert sum(found) == GLOBAL
        sizes += found
    if padded_to:
        assert sizes == [MICRO] * RANKS * ROUNDS * order.steps
    else:
        assert max(sizes) > MICRO and len(sizes) < RANKS * ROUNDS * order.steps


def test_a_short_step_holds_each_sequence_once_and_fills_up_without_targets(sources: list[StepSource]) -> None:
    batches = [source.next(2) for source in sources]
    micro = [each for batch in batches for each in batch.micro_batches]
    assert [len(batch.micro_batches) for batch in batches] == [1] * RANKS
    rows = [int(row) for each in micro for row in each.rows]
    assert rows == [int(row) for row in Order(13, GLOBAL, 17, 0).step(2)]
    assert sum(int((each.labels >= 0).sum()) for each in micro) == batches[0].targets
    filler = [each for each in micro if not len(each.rows)]
    assert [each.labels.max() for each in filler] == [-100]
    assert filler[0].labels.shape[1] == min(length for each in micro for length in lengths(each))
