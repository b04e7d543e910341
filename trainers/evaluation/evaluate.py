"""Evaluates one model folder on the evaluation shards, every row exactly once. No Ray, no process group."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.batching.batch_plan import AUTO_MICRO_BATCH_TOKENS
from trainers.batching.packing import PackIndex, index_packs
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.engine import load_options
from trainers.model.world import pick_device
from trainers.records import Array
from trainers.shards.dataset import ShardSet
from trainers.tasks import Task
from trainers.tasks.base import Example
from trainers.tokenizer.encoder import load_encoder


def evaluate_model(
    job: Job, task: Task, model_path: str, shards: ShardSet, on_progress: Callable[[float], None] | None = None
) -> tuple[Array, dict[str, Array]]:
    """Run the model over every row.

    Args:
        on_progress: called with the share done, 0 to 1.

    Returns:
        rows, int64 [rows], ascending; and what `Task.score` said of each, aligned with it.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    return combine(task, [score_share(job, task, model_path, shards, 0, 1, on_progress)], len(shards.lengths))


@dataclass(frozen=True)
class RowScores:
    """What was said of some rows, batch by batch, in the order in which they were looked at."""

    rows: list[Array]
    numbers: list[dict[str, Array]]


def score_share(
    job: Job,
    task: Task,
    model_path: str,
    shards: ShardSet,
    share: int,
    shares: int,
    on_progress: Callable[[float], None] | None = None,
) -> RowScores:
    """Run the model over every `shares`-th batch, from batch `share` on.

    Batches are the same whatever the number of shares, so that any number of processes gives the same numbers.
    """

    device = pick_device(job.scale.gpus_per_worker, job.scale.cpus_per_worker)
    encoder = load_encoder(model_path, job.model.trust_remote_code)
    task.prepare(encoder)
    pad_id = encoder.pad_id
    model: Any = task.load_model(model_path, pad_id=pad_id, **load_options(job)).to(device).eval()
    packs = index_packs(job, shards)
    found, done = RowScores([], []), 0
    for number, group in enumerate(_groups(packs, shards, job)):
        done += len(group)
        if number % shares == share:
            rows, numbers = _score(task, model, group, pad_id, device)
            found.rows.append(rows)
            found.numbers.append(numbers)
            if on_progress:
                on_progress(done / len(packs))
    return found


def _score(
    task: Task, model: Any, group: list[list[Example]], pad_id: int, device: Any
) -> tuple[Array, dict[str, Array]]:
    import torch

    batch = task.collate(group, pad_id)
    inputs, _ = batch.to(device)
    with torch.inference_mode():
        numbers = task.score(task.forward(model, inputs), batch)
        numbers |= task.generate(model, [row for pack in group for row in pack], pad_id)
    return batch.rows, numbers


def combine(task: Task, shares: Sequence[RowScores], expected: int) -> tuple[Array, dict[str, Array]]:
    """What several processes scored, in the rows' order.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    rows = [one for share in shares for one in share.rows]
    return task.merge(*_in_order(rows, [one for share in shares for one in share.numbers], expected))


def _groups(packs: PackIndex, shards: ShardSet, job: Job) -> Iterator[list[list[Example]]]:
    """Sequences of similar length together, as many as `evaluate.batch_size` and the token bound allow."""
    lengths = packs.sums(shards.lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(job.evaluate.batch_size, AUTO_MICRO_BATCH_TOKENS // longest), 1)
        yield [[shards.row(int(row)) for row in packs.pack(int(pack))] for pack in order[start : start + size]]
        start += size


def _in_order(rows: list[Array], row_scores: list[dict[str, Array]], expected: int) -> tuple[Array, dict[str, Array]]:
    places = np.concatenate(rows)
    order = np.argsort(places, kind="stable")
    if not np.array_equal(places[order], np.arange(expected)):
        raise EvaluationError(
            f"the evaluation saw {len(np.unique(places))} of {expected} rows in {len(places)} results"
        )
    return places[order], {name: np.concatenate([one[name] for one in row_scores])[order] for name in row_scores[0]}
