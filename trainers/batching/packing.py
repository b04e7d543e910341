"""Best-fit-decreasing packing of documents into sequences, from lengths alone.

Works on counts of equal lengths and rooms (histogram packing, Krell et al. 2021, arXiv:2107.02027), so its time depends
on the number of distinct lengths, not on the number of documents squared.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.batching.mixture import draw_mixture, entries_of_rows, shares_of
from trainers.job.schema import Job
from trainers.shards.dataset import ShardSet
from trainers.storage import Folder, load_array, save_array

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PackIndex:
    """Which rows share a sequence: pack p holds rows[offsets[p]:offsets[p + 1]]."""

    offsets: Array
    """int64 [packs + 1]."""
    rows: Array
    """int64 [rows]: every row exactly once."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Array:
        members: Array = self.rows[self.offsets[index] : self.offsets[index + 1]]
        return members

    def sums(self, per_row: Array) -> Array:
        """Sum of a per-row number over each pack, int64 [packs]."""
        running = np.concatenate([[0], np.cumsum(per_row[self.rows], dtype=np.int64)])
        totals: Array = running[self.offsets[1:]] - running[self.offsets[:-1]]
        return totals


def one_row_each(count: int) -> PackIndex:
    """No packing: every row is its own sequence."""
    return PackIndex(np.arange(count + 1, dtype=np.int64), np.arange(count, dtype=np.int64))


def pack_rows(lengths: Array, capacity: int, seed: int) -> PackIndex:
    """Pack rows of the given lengths into sequences of at most `capacity` tokens.

    Args:
        lengths: int [rows], each between 1 and capacity.
        seed: which of several rows of one length go together.

    Raises:
        ValueError: where a row is longer than the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit a sequence of {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of = _assign(np.bincount(lengths, minlength=capacity + 1), capacity)
    by_pack = np.argsort(pack_of, kind="stable")
    counts = np.bincount(pack_of) if len(pack_of) else np.zeros(0, dtype=np.int64)
    return PackIndex(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), order[by_pack].astype(np.int64))


class _Rooms:
    """Open packs by the room left in them, with the smallest sufficient room found by one bit scan."""

    def __init__(self) -> None:
        self._packs: dict[int, list[Array]] = {}
        self._mask = 0

    def add(self, room: int, packs: Array) -> None:
        if room and len(packs):
            self._packs.setdefault(room, []).append(packs)
            self._mask |= 1 << room

    def smallest(self, length: int) -> int | None:
        above = self._mask >> length
        return (above & -above).bit_length() - 1 + length if above else None

    def take(self, room: int, count: int) -> Array:
        """Up to `count` packs of exactly this room."""
        group = self._packs[room]
        packs = group.pop()
        if len(packs) > count:
            group.append(packs[count:])
            packs = packs[:count]
        if not group:
            del self._packs[room]
            self._mask &= ~(1 << room)
        return packs


def _assign(histogram: Array, capacity: int) -> Array:
    """Pack number of each row, rows given in order of falling length; histogram[l] rows have length l."""
    rooms, assigned, packs_open = _Rooms(), [], 0
    for length in np.flatnonzero(histogram)[::-1].tolist():
        rows_left = int(histogram[length])
        while rows_left:
            room = rooms.smallest(length)
            if room is not None:
                packs = rooms.take(room, rows_left)
                rooms.add(room - length, packs)
                assigned.append(packs)
            else:
                each = min(capacity // length, rows_left)
                packs = np.arange(packs_open, packs_open + rows_left // each, dtype=np.int64)
                packs_open += len(packs)
                rooms.add(capacity - each * length, packs)
                assigned.append(np.tile(packs, each))
                packs = assigned[-1]
            rows_left -= len(packs)
    return np.concatenate(assigned) if assigned else np.zeros(0, dtype=np.int64)


def index_packs(job: Job, shards: ShardSet) -> PackIndex:
    """Which rows share a sequence: the index beside the shards, or the same made anew; every rank gets the same."""
    capacity, seed = job.data.max_length, job.train.seed
    if shards.manifest.entries:
        rows = draw_mixture(entries_of_rows(shards.manifest), shards.lengths, shares_of(job), seed)
        packs = pack_rows(shards.lengths[rows], capacity, seed) if job.packing else one_row_each(len(rows))
        return PackIndex(packs.offsets, rows[packs.rows])
    return load_packs(shards.folder, shards.lengths, capacity, seed) if job.packing else one_row_each(len(shards))


def load_packs(folder: Folder, lengths: Array, capacity: int, seed: int) -> PackIndex:
    """The packs of a split, from the index beside its shards; made and written where it is not there yet."""
    name = f"packs-{capacity}-{seed}.npy"
    try:
        return unfold(load_array(folder, name))
    except (FileNotFoundError, ValueError):
        packs = pack_rows(lengths, capacity, seed)
        save_array(folder, name, fold(packs))
        return packs


def fold(packs: PackIndex) -> Array:
    """A pack index as one array, int64: the number of packs, their offsets, the rows."""
    return np.concatenate([[len(packs)], packs.offsets, packs.rows]).astype(np.int64)


def unfold(folded: Array) -> PackIndex:
    """The pack index of such an array, as views of it. Raises ValueError where it is not one."""
    count = int(folded[0]) if len(folded) else -1
    offsets, rows = folded[1 : count + 2], folded[count + 2 :]
    if count < 0 or len(offsets) != count + 1 or offsets[-1] != len(rows):
        raise ValueError("not a pack index")
    return PackIndex(offsets, rows)
