"""Every input row of a split and what became of it, and every token of a step and the row it came from.

Ledgers are read a shard at a time, and only where a shard holds the outcome asked for. Begin at `ledger_lines`.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from trainers.records import Record
from trainers.shards.manifest import ShardManifest
from trainers.storage import Folder


class LedgerLine(Record):
    """One input row."""

    split: str
    file: str
    row: int
    """Byte offset of the line for jsonl and text, row number from 0 for the others."""
    outcome: str
    tokens: int
    """Tokens it gave, over all its sequences."""
    tokens_lost: int


def matches(outcome: str, reason: str) -> bool:
    """Whether an outcome is the one asked for: by its whole name, its kind (dropped) or its reason (malformed)."""
    return reason in (outcome, *outcome.split(":", 1))


def ledger_lines(folder: Folder, manifest: ShardManifest, reason: str | None = None) -> Iterator[LedgerLine]:
    """The rows of a split with a given outcome, or all of them, in the order of the files."""
    for shard in manifest.shards:
        wanted = [name for name in shard.outcomes if reason is None or matches(name, reason)]
        if not wanted:
            continue
        with folder.open_input(shard.ledger) as stream:
            table = pa.ipc.open_file(stream).read_all()
        outcomes = pc.cast(table["outcome"], pa.string())
        table = table.drop_columns(["outcome"]).append_column("outcome", outcomes)
        for line in table.filter(pc.is_in(outcomes, pa.array(wanted))).to_pylist():
            yield LedgerLine(
                split=manifest.split,
                file=manifest.sources[line["file"]],
                row=line["row"],
                outcome=line["outcome"],
                tokens=line["tokens"],
                tokens_lost=line["tokens_lost"],
            )
