"""Evaluates one model folder on the evaluation shards, every row exactly once. No Ray, no process group."""

from collections.abc import Callable, Sequence
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
from trainers.run.record import Run
from trainers.run.row_scores import write_row_scores
from trainers.shards.dataset import ShardSet
from trainers.tasks import Task
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

    def add(self, rows: Array, numbers: dict[str, Array]) -> None:
        """One more batch."""
        self.rows.append(rows)
        self.numbers.append(numbers)


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
    model: Any = task.load_model(model_path, pad_id=encoder.pad_id, **load_options(job)).to(device).eval()
    batches = plan_evaluation(job, task, shards, encoder.pad_id)
    found = RowScores([], [])
    for number in range(share, len(batches), shares):
        found.add(*batches.score(number, model, device))
        if on_progress:
            on_progress((number + 1) / len(batches))
    return found


@dataclass(frozen=True)
class EvaluationBatches:
    """The evaluation set in batches, and what a task says of each: the same for every holder of the model."""

    task: Task
    shards: ShardSet
    packs: PackIndex
    groups: list[Array]
    """Of each batch the numbers of its packs."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.groups)

    def score(self, number: int, model: Any, device: Any) -> tuple[Array, dict[str, Array]]:
        """Rows of one batch and the numbers of each, by a model in evaluation mode."""
        import torch

        group = [[self.shards.row(int(row)) for row in self.packs.pack(int(pack))] for pack in self.groups[number]]
        batch = self.task.collate(group, self.pad_id)
        inputs, labels = batch.to(device)
        with torch.no_grad():  # not inference mode: weights that ZeRO-3 gathers in it could not be trained again
            numbers = self.task.score(self.task.answers(model, inputs, labels), batch)
            numbers |= self.task.generate(model, [row for pack in group for row in pack], self.pad_id)
        return batch.rows, numbers


def plan_evaluation(job: Job, task: Task, shards: ShardSet, pad_id: int) -> EvaluationBatches:
    """Sequences of similar length together, as many as `evaluate.batch_size` and the token bound allow."""
    packs = index_packs(job, shards)
    lengths = packs.sums(shards.lengths)
    order, groups, start = np.argsort(-lengths, kind="stable"), [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(job.evaluate.batch_size, AUTO_MICRO_BATCH_TOKENS // longest), 1)
        groups.append(order[start : start + size])
        start += size
    return EvaluationBatches(task, shards, packs, groups, pad_id)


def combine(task: Task, shares: Sequence[RowScores], expected: int) -> tuple[Array, dict[str, Array]]:
    """What several processes scored, in the rows' order.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    rows = [one for share in shares for one in share.rows]
    return task.merge(*_in_order(rows, [one for share in shares for one in share.numbers], expected))


def keep_scores(
    run: Run, task: Task, step: int, shares: Sequence[RowScores]
) -> tuple[dict[str, float], dict[str, str], int]:
    """Write what was said of each row of a step. Returns its metrics, their notes, and the number of rows.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    rows, row_scores = combine(task, shares, len(run.open_shards("eval", task).lengths))
    write_row_scores(run.folder, step, rows, row_scores, task.labels)
    metrics = task.metrics(row_scores)
    return metrics, {name: note for name, note in task.notes().items() if name in metrics}, len(rows)


def _in_order(rows: list[Array], row_scores: list[dict[str, Array]], expected: int) -> tuple[Array, dict[str, Array]]:
    places = np.concatenate(rows)
    order = np.argsort(places, kind="stable")
    if not np.array_equal(places[order], np.arange(expected)):
        raise EvaluationError(
            f"the evaluation saw {len(np.unique(places))} of {expected} rows in {len(places)} results"
        )
    return places[order], {name: np.concatenate([one[name] for one in row_scores])[order] for name in row_scores[0]}
