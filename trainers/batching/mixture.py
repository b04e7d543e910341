"""Which rows an epoch shows, where the parts of the training data have weights or token budgets.

A function of lengths, weights and seed: shards are never written again for another mixture. Begin at `draw_mixture`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.job.schema import Job, SourceSection
from trainers.records import Array, Record
from trainers.shards.manifest import ShardManifest


@dataclass(frozen=True)
class Share:
    """How much of one part an epoch shows: each row `weight` times, or rows of `tokens` tokens. Default: all once."""

    weight: float | None = None
    tokens: int | None = None


class PartDrawn(Record):
    """What a mixture takes of one part an epoch."""

    path: str
    rows: int
    """Sequences there are."""
    tokens: int
    rows_drawn: int
    """Sequences an epoch shows, repeats counted."""
    tokens_drawn: int


def shares_of(job: Job) -> tuple[Share, ...]:
    return tuple(
        Share(entry.weight, entry.tokens) if isinstance(entry, SourceSection) else Share() for entry in job.data.train
    )


def entries_of_rows(manifest: ShardManifest) -> Array:
    """For each sequence of a split the entry of `data.train` it came from, int64 [rows]."""
    entries = np.array(manifest.entries, dtype=np.int64)[manifest.numbers("source")]
    return np.repeat(entries, manifest.numbers("rows"))


def draw_mixture(entries: Array, lengths: Array, shares: Sequence[Share], seed: int) -> Array:
    """Rows of an epoch, int64, some of them several times; in the order of the split, copy after copy.

    Args:
        entries: int64 [rows]: the entry that a row belongs to.
        lengths: int32 [rows]: its tokens.
        shares: for each entry.
        seed: decides which rows a part of a copy holds.
    """
    drawn = [_draw(np.flatnonzero(entries == entry), lengths, share, (seed, entry))
             for entry, share in enumerate(shares)]  # fmt: skip
    return np.concatenate(drawn) if drawn else np.zeros(0, np.int64)


def describe_mixture(job: Job, manifest: ShardManifest, lengths: Array) -> list[PartDrawn]:
    """What each entry of `data.train` holds, and what an epoch shows of it."""
    entries = entries_of_rows(manifest)
    drawn = draw_mixture(entries, lengths, shares_of(job), job.train.seed)
    return [
        PartDrawn(
            path=path,
            rows=int((entries == entry).sum()),
            tokens=int(lengths[entries == entry].sum()),
            rows_drawn=int((entries[drawn] == entry).sum()),
            tokens_drawn=int(lengths[drawn[entries[drawn] == entry]].sum()),
        )
        for entry, path in enumerate(job.data.train_paths)
    ]


def _draw(rows: Array, lengths: Array, share: Share, seed: tuple[int, int]) -> Array:
    total = int(lengths[rows].sum())
    if not len(rows) or not total:
        return rows
    shuffled = np.random.default_rng(seed).permutation(rows)
    if share.tokens is not None:
        copies, rest = divmod(share.tokens, total)
        reach = np.cumsum(lengths[shuffled], dtype=np.int64)
        part = shuffled[: int(np.searchsorted(reach, rest, side="right"))]
    else:
        weight = 1.0 if share.weight is None else share.weight
        copies = int(weight)
        part = shuffled[: round((weight - copies) * len(rows))]
    return np.concatenate([np.tile(rows, copies), np.sort(part)])
