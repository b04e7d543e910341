"""Training rows that say what some evaluation row says, found from the ledgers of both splits alone.

Begin at `find_contamination`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from trainers.records import Array, Record
from trainers.shards.manifest import ShardRecord, read_manifest
from trainers.storage import Folder

EXAMPLES = 10


class Contamination(Record):
    """Training rows that say what some evaluation row says, case and white space around it aside."""

    rows: int
    examples: tuple[tuple[str, int], ...]
    """(file, row) of the first of them."""


@lru_cache(maxsize=2)
def read_texts(folder: Folder) -> Array:
    """The digests of what the rows of a committed split say, uint64, sorted, each once."""
    manifest = read_manifest(folder)
    texts = [_ledger(folder, shard)["text"].to_numpy() for shard in manifest.shards] if manifest else []
    found: Array = np.unique(np.concatenate([np.zeros(0, np.uint64), *texts]))
    digests: Array = found[found != 0]  # 0: malformed
    return digests


def contained(texts: Array, held_out: Array) -> Array:
    """Which digests are among the sorted ones, bool [texts]."""
    if not len(held_out):
        return np.zeros(len(texts), bool)
    nearest = np.minimum(np.searchsorted(held_out, texts), len(held_out) - 1)
    found: Array = held_out[nearest] == texts
    return found


def find_contamination(splits: tuple[Folder, Folder, Sequence[str]], shards: Sequence[ShardRecord]) -> Contamination:
    """Look for the texts of the evaluation set among the rows of some training shards.

    Args:
        splits: folders of the training and the evaluation shards, and the training files.
    """
    folder, eval_folder, sources = splits
    held_out, count = read_texts(eval_folder), 0
    examples: list[tuple[str, int]] = []
    for shard in shards:
        ledger = _ledger(folder, shard)
        rows = ledger["row"].to_numpy()[contained(ledger["text"].to_numpy(), held_out)]
        count += len(rows)
        examples += [(sources[shard.source], int(row)) for row in rows[: EXAMPLES - len(examples)]]
    return Contamination(rows=count, examples=tuple(examples))


def contamination_name(eval_key: str) -> str:
    return f"contamination-{eval_key}.json"


def _ledger(folder: Folder, shard: ShardRecord) -> pa.Table:
    with folder.open_input(shard.ledger) as stream:
        return pa.ipc.open_file(stream).read_all().select(["row", "text"])
