"""The micro-batches of a step for one rank, collated ahead of time by a thread.

Every rank works out the whole step from lengths alone, so ranks agree on targets and token counts without a word, and
take equal numbers of micro-batches: where one is missing, a copy of a sequence without targets takes its place, which
adds nothing to the loss.

Within a step, micro-batches are cut from its sequences by length, the longest first (`cutting`), and dealt to the ranks
in turn: little padding, ranks that work alike at any moment, and the long sequences at a step's beginning. What a step
holds, and so its gradient, is the order's alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainers.batching.batch_plan import BatchPlan
from trainers.batching.cutting import cut_step
from trainers.batching.order import Order
from trainers.batching.packing import PackIndex
from trainers.shards.dataset import ShardSet
from trainers.tasks import Task
from trainers.tasks.base import IGNORE, Batch

POLL_S = 0.1
WIDEST = 8
"""A short sequence counts as at least this share of the longest one, so no micro-batch holds more than so many times as
many of them. Some models pad rows to a block of attention."""


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step, as one rank sees it."""

    micro_batches: tuple[Batch, ...]
    targets: int
    """Targets of the whole step over all ranks: the loss's denominator."""
    tokens: int
    """Tokens of the whole step over all ranks."""


class StepSource:
    """Gives any step's micro-batches; asking for the next one in order finds it ready."""

    def __init__(
        self,
        shards: ShardSet,
        packs: PackIndex,
        order: Order,
        plan: BatchPlan,
        rank: int,
        task: Task,
        pad_id: int,
        overhead: float = 0.0,
    ) -> None:
        """Args: overhead: what a micro-batch costs beside its positions, in positions."""
        self._shards, self._packs, self._order, self._plan = shards, packs, order, plan
        self._rank, self._task, self._pad_id = rank, task, pad_id
        self._overhead = overhead
        self._targets, self._tokens = packs.sums(shards.targets), packs.sums(shards.lengths)
        spans = packs.sums(task.spans(shards.lengths, shards.targets))
        self._longest = int(spans.max(initial=1))
        alike = bool(task.options.pack_length)  # padded to one length, each for itself
        self._spans = np.maximum(spans, self._longest if alike else -(-self._longest // WIDEST))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collate")
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    def ready(self, step: int, give_up: Callable[[], object]) -> bool:
        """Wait until a step's batch is there; False where `give_up` says anything before that."""
        while not wait([self._start(step)], timeout=POLL_S).done:
            if give_up():
                return False
        return True

    def is_ready(self, step: int) -> bool:
        """Whether a step's batch is there already."""
        return self._ahead is not None and self._ahead[0] == step and self._ahead[1].done()

    def next(self, step: int) -> StepBatch:
        """Micro-batches of step `step` (counted from 0); starts on the one after it."""
        batch = self._start(step).result()
        if step + 1 < self._order.steps:
            self._start(step + 1)
        return batch

    def _start(self, step: int) -> Future[StepBatch]:
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._make, step))
        return self._ahead[1]

    def sequences(self, step: int) -> Sequence[int]:
        return [int(one) for one in self._order.step(step)]

    def origins(self, step: int) -> list[tuple[str, int, int]]:
        """(file, row, part) of every sequence of the whole step."""
        packs = (self._packs.pack(sequence) for sequence in self.sequences(step))
        return [self._shards.origin(int(row)) for pack in packs for row in pack]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> StepBatch:
        sequences = self._order.step(step)
        sequences = sequences[np.lexsort((-self._tokens[sequences], -self._spans[sequences]))]
        cuts = cut_step(self._spans[sequences], self._plan, self._longest, self._overhead)
        own = cuts[self._rank // self._plan.sharing :: self._plan.groups]
        micro_batches = tuple(self._collate(sequences[cut], sequences, step + 1) for cut in own)
        targets, tokens = int(self._targets[sequences].sum()), int(self._tokens[sequences].sum())
        return StepBatch(micro_batches, max(targets, 1), tokens)

    def _collate(self, sequences: Any, of_step: Any, draw: int) -> Batch:
        """One micro-batch, or this rank's part of it; an empty one is the step's shortest sequence without targets."""
        rows = [self._rows(index) for index in (sequences if len(sequences) else of_step[-1:])]
        batch = self._task.collate(rows, self._pad_id, draw)
        if not len(sequences):
            batch = replace(batch, labels=np.full_like(batch.labels, IGNORE), rows=batch.rows[:0])
        ranks = self._plan.sharing
        return batch.part(self._rank % ranks, ranks) if ranks > 1 else batch

    def _rows(self, sequence: int) -> list[Any]:
        return [self._shards.row(int(row)) for row in self._packs.pack(int(sequence))]
