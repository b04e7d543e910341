"""What a committed set of shards says of itself. Torch-free: the controller, the trainers and the tools all read it."""

import json
from typing import Annotated, Any

import pyarrow as pa
import xxhash
from pydantic import PlainSerializer, PlainValidator

from trainers.errors import DataError
from trainers.records import Record
from trainers.shards.shard_table import ShardTable, as_records, as_table
from trainers.storage import Folder

MANIFEST, TABLE = "manifest.json", "shards.arrow"
TOTALS = ("rows", "tokens", "targets", "bytes", "tokens_lost")


class ShardManifest(Record):
    """A whole split, committed by the existence of this record beside its shards."""

    schema_version: int = 1
    key: str
    key_parts: dict[str, str]
    """Digest of each input that the key is made of; a miss names the part that changed."""
    split: str
    """train or eval."""
    task: str
    sources: tuple[str, ...]
    """The files read; `file` in shards and ledgers is an index into this."""
    shards: Annotated[ShardTable, PlainValidator(as_table), PlainSerializer(as_records)]
    tokenizer: str = "tokenizers"
    """The library that made the ids; which one never changes them."""
    fallback_reason: str | None = None
    """Where a quicker library was caught giving other ids, so that the split was written without it."""
    entries: tuple[int, ...] = ()
    """For each source the entry of data.train that names it, where a mixture tells them apart."""

    def total(self, name: str) -> int:
        """Sum of one numeric field (rows, tokens, targets, bytes, tokens_lost) over the shards."""
        return int(self.shards.numbers(name).sum())

    @property
    def outcomes(self) -> dict[str, int]:
        """Input rows by outcome, over all shards."""
        return self.shards.outcomes

    @property
    def labels(self) -> dict[str, int]:
        """Rows by label, over all shards, in sorted order of the label."""
        return self.shards.labels

    @property
    def rows_in(self) -> int:
        """Input rows: every one is in `outcomes` exactly once."""
        return sum(self.outcomes.values())

    @property
    def dropped(self) -> int:
        """Input rows that could not be used."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("dropped:"))

    @property
    def removed(self) -> int:
        """Input rows left out because the job asked for it: duplicates, or rows of the evaluation set."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("removed:"))


class Shards(Record):
    """The two splits of a job, ready to train on."""

    train: ShardManifest
    eval: ShardManifest


def shards_folder(storage: Folder, key: str) -> Folder:
    """Where the shards of a key live; shared by all runs of the storage."""
    return storage / "shards" / key


def read_manifest(folder: Folder) -> ShardManifest | None:
    """The manifest of a committed set, or None where there is none yet. Raises DataError where it is damaged."""
    try:
        data = folder.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        said = json.loads(data)
        if isinstance(said["shards"], dict):
            said["shards"] = _read_table(folder, said["shards"])
        return ShardManifest.model_validate(said)
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged or of another version: {error}. Remove {folder} to shard again"
        ) from error


def write_manifest(folder: Folder, manifest: ShardManifest) -> None:
    """Commit a split: the records of its shards as a table, then the manifest, which names the table and its digest."""
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_file(sink, manifest.shards.table.schema) as writer:
            writer.write_table(manifest.shards.table)
        table = sink.getvalue()
    folder.write_bytes(TABLE, table)
    totals = {name: manifest.total(name) for name in TOTALS}
    shards = {"table": TABLE, "digest": xxhash.xxh3_128_hexdigest(table), "count": len(manifest.shards), **totals}
    folder.write_json(MANIFEST, {**manifest.model_dump(mode="json", exclude={"shards"}), "shards": shards})


def _read_table(folder: Folder, said: dict[str, Any]) -> ShardTable:
    """The table that a manifest names. Raises ValueError where its digest is another."""
    with folder.open_input(said["table"]) as stream:
        content = stream.read_buffer()
        if xxhash.xxh3_128_hexdigest(content) != said["digest"]:
            raise ValueError(f"the digest of {said['table']} is not the one noted")
        return ShardTable(pa.ipc.open_file(content).read_all())


def check_labels(shards: Shards) -> None:
    """Refuse evaluation rows whose label training never saw. Raises DataError."""
    unseen = {label: count for label, count in shards.eval.labels.items() if label not in shards.train.labels}
    if unseen:
        listed = ", ".join(f"{label!r} ({count} rows)" for label, count in list(unseen.items())[:10])
        known = ", ".join(repr(label) for label in list(shards.train.labels)[:10])
        raise DataError(
            f"labels in data.eval that data.train never shows: {listed}. Known: {known}. "
            "Correct the labels, remove those rows, or add training rows with them"
        )
