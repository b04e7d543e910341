"""Evaluates one model folder on the evaluation shards, every row exactly once. No Ray, no process group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.batching.batch_plan import AUTO_MICRO_BATCH_TOKENS
from trainers.batching.packing import PackIndex, index_packs
from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import Intervals, intervals_beside
from trainers.evaluation.placement import load_to_evaluate
from trainers.job.schema import Job
from trainers.records import Array
from trainers.run.folder import Evaluation
from trainers.run.record import Run
from trainers.run.row_scores import write_row_scores
from trainers.shards.dataset import ShardSet
from trainers.tasks import SET, Task, guard_margins
from trainers.tasks.losses import gather_scores
from trainers.tasks.metrics.own import TEXT
from trainers.tokenizer.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    from trainers.architecture.sequence_parallel import SequenceGroup


def evaluate_model(
    job: Job,
    task: Task,
    model_path: str,
    shards: ShardSet,
    on_progress: Callable[[float], None] | None = None,
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """Run the model over every row.

    Args:
        on_progress: called with the share done, 0 to 1.
        options: of from_pretrained, beside those of the job.

    Returns:
        rows, int64 [rows], ascending; and what `Task.score` said of each, aligned with it.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    return combine(
        task, [score_share(job, task, model_path, shards, 0, 1, on_progress, **options)], len(shards.lengths)
    )


@dataclass(frozen=True)
class RowScores:
    """What was said of some rows, batch by batch, in the order in which they were looked at."""

    rows: list[Array]
    numbers: list[dict[str, Array]]

    def add(self, rows: Array, numbers: dict[str, Array]) -> None:
        """One more batch."""
        self.rows.append(rows)
        self.numbers.append(numbers)


SetScores = dict[str, RowScores]
"""By evaluation set; the deciding one has no name."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be scored."""

    task: Task
    model: Any
    encoder: Encoder
    device: Any


def load_for_scoring(job: Job, task: Task, model_path: str, **options: Any) -> Loaded:
    """The model of a folder in evaluation mode."""
    encoder = load_encoder(model_path, job.model.trust_remote_code)
    task.prepare(encoder)
    model, device = load_to_evaluate(job, task, model_path, encoder.pad_id, **options)
    return Loaded(task, model, encoder, device)


def score_share(
    job: Job,
    task: Task,
    model_path: str,
    shards: ShardSet,
    share: int,
    shares: int,
    on_progress: Callable[[float], None] | None = None,
    **options: Any,
) -> RowScores:
    """Run the model over every `shares`-th batch of one set, from batch `share` on."""
    loaded = load_for_scoring(job, task, model_path, **options)
    batches = plan_sets(job, task, {"": shards}, loaded.encoder)
    return score_batches(loaded, batches, share, shares, on_progress)[""]


def score_batches(
    loaded: Loaded,
    batches: SetBatches,
    share: int,
    shares: int,
    on_progress: Callable[[float], None] | None = None,
) -> SetScores:
    """Run a model over every `shares`-th batch, from batch `share` on.

    Batches are the same whatever the number of shares, so that any number of processes gives the same numbers.
    """
    found = batches.nothing()
    for number in range(share, len(batches), shares):
        name, rows, numbers = batches.score(number, loaded.model, loaded.device)
        found[name].add(rows, numbers)
        if on_progress:
            on_progress((number + 1) / len(batches))
    return found


@dataclass(frozen=True)
class EvaluationBatches:
    """An evaluation set in batches, and what a task says of each: the same for every holder of the model."""

    task: Task
    shards: ShardSet
    packs: PackIndex
    groups: list[Array]
    """Of each batch the numbers of its packs."""
    encoder: Encoder

    def __len__(self) -> int:
        return len(self.groups)

    def score(
        self, number: int, model: Any, device: Any, group: SequenceGroup | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Rows of one batch and the numbers of each, by a model in evaluation mode.

        Args:
            group: ranks that have its sequences together, and all call this with the same number.
        """
        import torch

        packs = [[self.shards.row(int(row)) for row in self.packs.pack(int(pack))] for pack in self.groups[number]]
        documents, pad_id = [row for pack in packs for row in pack], self.encoder.pad_id
        batch = self.task.collate(packs, pad_id)
        part = batch.part_of(group)
        with torch.no_grad():  # not inference mode: weights that ZeRO-3 gathers in it could not be trained again
            answers = self.task.answers(model, *part.to(device))
            numbers = self.task.score(gather_scores(answers, part.labels, group) if group else answers, batch)
            numbers |= self.task.generate(model, documents, pad_id)
        if self.task.options.metrics:
            decode = partial(self.encoder.tokenizer.decode, skip_special_tokens=True)
            texts = [decode(row.input_ids.tolist()) for row in documents]
            numbers |= {TEXT: np.array(texts, dtype=object)}
        return batch.rows, numbers


@dataclass(frozen=True)
class SetBatches:
    """Every evaluation set in batches, one after the other."""

    sets: dict[str, EvaluationBatches]

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def nothing(self) -> SetScores:
        """No rows of any set."""
        return {name: RowScores([], []) for name in self.sets}

    def score(
        self, number: int, model: Any, device: Any, group: SequenceGroup | None = None
    ) -> tuple[str, Array, dict[str, Array]]:
        """The set of a batch, its rows and their numbers."""
        for name, batches in self.sets.items():
            if number < len(batches):
                return name, *batches.score(number, model, device, group)
            number -= len(batches)
        raise IndexError(number)


def plan_sets(job: Job, task: Task, held: Mapping[str, ShardSet], encoder: Encoder) -> SetBatches:
    """Batches of all sets, as `Run.open_held` gives them."""
    return SetBatches({name: plan_evaluation(job, task, shards, encoder) for name, shards in held.items()})


def plan_evaluation(job: Job, task: Task, shards: ShardSet, encoder: Encoder) -> EvaluationBatches:
    """Sequences of similar length together, as many as `evaluate.batch_size` and the token bound allow."""
    packs = index_packs(job, shards)
    lengths = packs.sums(shards.lengths)
    order, groups, start = np.argsort(-lengths, kind="stable"), [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(job.evaluate.batch_size, AUTO_MICRO_BATCH_TOKENS // longest), 1)
        groups.append(order[start : start + size])
        start += size
    return EvaluationBatches(task, shards, packs, groups, encoder)


def combine(task: Task, shares: Sequence[RowScores], expected: int) -> tuple[Array, dict[str, Array]]:
    """What several processes scored, in the rows' order.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    rows = [one for share in shares for one in share.rows]
    return task.merge(*_in_order(rows, [one for share in shares for one in share.numbers], expected))


@dataclass(frozen=True)
class Measured:
    """What an evaluation came to."""

    metrics: dict[str, float]
    intervals: Intervals
    notes: dict[str, str]
    guards: dict[str, float]
    rows: int
    computed_on: str = ""


def keep_scores(run: Run, task: Task, step: int, shares: Sequence[SetScores], computed_on: str = "") -> Measured:
    """Write what was said of each row of a step, set by set, and measure it.

    Args:
        computed_on: as `trainers.evaluation.device.computed_on` says it, where one kind of device scored all rows.

    Raises:
        EvaluationError: where a row is missing or counted twice, or a metric of the job's own fails.
    """
    numbers: dict[str, dict[str, Array]] = {}
    for name, shards in run.open_held(task).items():
        rows, numbers[name] = combine(task, [share[name] for share in shares], len(shards.lengths))
        write_row_scores(run.folder, step, rows, numbers[name], task.labels, name)
    return replace(measure_sets(run.job, task, numbers), computed_on=computed_on)


def measure_sets(job: Job, task: Task, numbers: Mapping[str, dict[str, Array]]) -> Measured:
    """Metrics of all sets with their intervals; those of a set beside the deciding one as METRIC@SET.

    Args:
        numbers: what `combine` gave, by set.

    Raises:
        EvaluationError: where a metric of the job's own fails.
    """
    metrics: dict[str, float] = {}
    intervals: Intervals = {}
    notes: dict[str, str] = {}
    for name, row_scores in numbers.items():
        found, where = task.measure(row_scores), f"{name and SET}{name}"
        check_repeatable(task, row_scores, found)
        between, without = intervals_beside(row_scores, task, job.train.seed)
        metrics |= {f"{metric}{where}": value for metric, value in found.items()}
        intervals |= {f"{metric}{where}": pair for metric, pair in between.items() if metric in found}
        notes |= {f"{metric}{where}": why for metric, why in without.items() if metric in found}
    notes |= {name: note for name, note in task.notes().items() if name in metrics}
    total = sum(len(next(iter(row_scores.values()))) for row_scores in numbers.values())
    return Measured(metrics, intervals, notes, guard_margins(job, metrics), total)


def done_evaluation(step: int, eval_key: str, measured: Measured, seconds: float) -> Evaluation:
    """The record of an evaluation that ended well."""
    return Evaluation(step=step, status="done", eval_key=eval_key, seconds=seconds, **asdict(measured))


def check_repeatable(task: Task, row_scores: Mapping[str, Array], found: Mapping[str, float]) -> None:
    """Refuse a metric of the job's own that says two things of the same rows. Raises EvaluationError."""
    for name in task.options.metrics:
        again = task.metric_value(name, row_scores)
        if not np.array_equal(again, found[name], equal_nan=True):
            raise EvaluationError(
                f"evaluate.metrics.{name}: gave {found[name]!r} and then {again!r} for the same rows; what it draws "
                "must be seeded"
            )


def _in_order(rows: list[Array], row_scores: list[dict[str, Array]], expected: int) -> tuple[Array, dict[str, Array]]:
    places = np.concatenate(rows)
    order = np.argsort(places, kind="stable")
    if not np.array_equal(places[order], np.arange(expected)):
        raise EvaluationError(
            f"the evaluation saw {len(np.unique(places))} of {expected} rows in {len(places)} results"
        )
    return places[order], {name: np.concatenate([one[name] for one in row_scores])[order] for name in row_scores[0]}
