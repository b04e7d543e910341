"""What is known of a committed split without opening its shards: lengths and targets of every sequence, what its rows
say (as digests), which packs they make, and which training rows the evaluation set holds as well.

Each is one file beside the shards, written once by one process that looks at a shard at a time, and memory-mapped by
whoever reads it. All of it can be made again from the shards. Begin at `write_lengths`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from trainers.records import Array, Record
from trainers.shards.manifest import ShardManifest
from trainers.shards.shard_table import ShardRecord
from trainers.storage import Folder, load_array, save_array

LENGTHS, TEXTS = "lengths.npy", "texts.npy"
EXAMPLES = 10
COUNTS = np.dtype([("length", "<i4"), ("targets", "<i4")])


class Contamination(Record):
    """Training rows that say what some evaluation row says, case and white space around it aside."""

    rows: int
    examples: tuple[tuple[str, int], ...]
    """(file, row) of the first of them."""


def write_counts(folder: Folder, lengths: Array, targets: Array) -> None:
    """Write the lengths and targets of all sequences of a split, in order."""
    counts = np.empty(len(lengths), COUNTS)
    counts["length"], counts["targets"] = lengths, targets
    save_array(folder, LENGTHS, counts)


def read_counts(folder: Folder) -> Array | None:
    """Lengths and targets of all sequences, or None where they have not been written."""
    try:
        return load_array(folder, LENGTHS)
    except FileNotFoundError:
        return None


def write_texts(folder: Folder, manifest: ShardManifest) -> None:
    """Write the digests of what the rows of a split say, each once, sorted."""
    found = [_ledger(folder, shard, ["text"])["text"].to_numpy() for shard in manifest.shards]
    texts = np.unique(np.concatenate([*found, np.zeros(0, np.uint64)]).astype(np.uint64))
    save_array(folder, TEXTS, texts[texts != 0])


@lru_cache(maxsize=2)
def read_texts(folder: Folder) -> Array:
    """The digests that `write_texts` wrote."""
    return load_array(folder, TEXTS)


def contained(texts: Array, held_out: Array) -> Array:
    """Which digests are among the sorted ones, bool [texts]."""
    if not len(held_out):
        return np.zeros(len(texts), bool)
    places = np.minimum(np.searchsorted(held_out, texts), len(held_out) - 1)
    found: Array = held_out[places] == texts
    return found


def find_contamination(
    folder: Folder, sources: Sequence[str], shards: Sequence[ShardRecord], eval_folder: Folder
) -> Contamination:
    """Look for the texts of the evaluation set among the rows of some training shards, from ledgers alone."""
    held_out, count = read_texts(eval_folder), 0
    examples: list[tuple[str, int]] = []
    for shard in shards:
        ledger = _ledger(folder, shard, ["row", "text"])
        rows = ledger["row"].to_numpy()[contained(ledger["text"].to_numpy(), held_out)]
        count += len(rows)
        examples += [(sources[shard.source], int(row)) for row in rows[: EXAMPLES - len(examples)]]
    return Contamination(rows=count, examples=tuple(examples))


def contamination_name(eval_key: str) -> str:
    """The file of a training split that holds the record for one evaluation split."""
    return f"contamination-{eval_key}.json"


def _ledger(folder: Folder, shard: ShardRecord, columns: Sequence[str]) -> pa.Table:
    with folder.open_input(shard.ledger) as stream:
        return pa.ipc.open_file(stream).read_all().select(list(columns))
