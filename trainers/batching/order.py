"""Which sequences make up which step: a pure function of (seed, position), the same at any world size.

The run is one stream of positions. Position p lies in epoch p // N and shows sequence permutation_epoch(p % N); step s
takes positions [s·G, s·G + G). So a sequence is seen exactly once an epoch, an epoch's last step is not cut short (only
the run's last may be), and seeking to any step costs nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.job.schema import Job

Array = np.ndarray[Any, np.dtype[Any]]
ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """The order of a whole run."""

    sequences: int
    """N: sequences in one epoch."""
    global_batch_size: int
    """G: sequences an optimizer step."""
    total: int
    """Sequences in the whole run."""
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run; only the last may hold fewer than G sequences."""
        return -(-self.total // self.global_batch_size)

    def step(self, step: int) -> Array:
        """Sequences of one step (counted from 0), int64 [up to G], in global order."""
        start = step * self.global_batch_size
        positions = np.arange(start, min(start + self.global_batch_size, self.total), dtype=np.int64)
        epochs = positions // self.sequences
        return np.concatenate(
            [shuffled(positions[epochs == epoch] % self.sequences, self.sequences, self.seed, int(epoch))
             for epoch in np.unique(epochs)]
            or [positions]
        )  # fmt: skip


def plan_order(sequences: int, global_batch_size: int, epochs: float | None, steps: int | None, seed: int) -> Order:
    """The order that a job's `epochs` or `steps` asks for. Epochs round to whole sequences, at least one."""
    total = steps * global_batch_size if steps is not None else max(round((epochs or 0) * sequences), 1)
    return Order(sequences, global_batch_size, total, seed)


def shuffled(positions: Array, size: int, seed: int, epoch: int) -> Array:
    """Images of positions under a pseudo-random permutation of range(size), in constant memory.

    A balanced Feistel network over the next power of four, with cycle-walking back into the range
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = np.uint64((1 << half) - 1)
    keys = _mix(
        np.arange(ROUNDS, dtype=np.uint64) + _mix(np.array([seed], np.uint64) * np.uint64(1 << 20) + np.uint64(epoch))
    )
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # the domain is less than four times the range: about two rounds in expectation
        values[outside] = _feistel(values[outside], keys, np.uint64(half), mask)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: Array, keys: Array, half: np.uint64, mask: np.uint64) -> Array:
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    mixed: Array = (left << half) | right
    return mixed


def _mix(values: Array) -> Array:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Array = values ^ (values >> np.uint64(31))
    return mixed


def job_order(job: Job, sequences: int) -> Order:
    return plan_order(sequences, job.train.global_batch_size, job.train.epochs, job.train.steps, job.train.seed)
