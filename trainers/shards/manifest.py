"""What a committed set of shards says of itself. Torch-free: the controller, the trainers and the tools all read it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from trainers.errors import DataError
from trainers.records import Array, Record
from trainers.storage import Folder
from trainers.tasks import load_task

MANIFEST = "manifest.json"
INTEGER = re.compile(r"-?(0|[1-9]\d*)")
SCHEMA_VERSION = 2
"""2: the records of the shards stand in the manifest itself. Sets of version 1 count as not written."""


class ShardRecord(Record):
    """One committed shard: `file` holds the sequences, `ledger` one line per input row."""

    file: str
    ledger: str
    unit: str
    """Digest of all that decides the bytes of both: a unit with the same digest need not be written again."""
    source: int
    """The file it was read from, as an index into the manifest's sources."""
    rows: int
    """Sequences in `file` (a split input row gives several)."""
    tokens: int
    targets: int
    """Tokens, or rows, that the loss is taken over."""
    bytes: int
    digest: str
    """xxh3-128 of `file`."""
    outcomes: dict[str, int]
    """Input rows by outcome: kept, truncated, split, dropped:REASON, or removed:REASON where the job asked for that."""
    tokens_lost: int
    """Tokens cut off from truncated rows."""
    labels: dict[str, int] = {}
    """Rows by label, where the task has one."""
    notes: dict[str, int] = {}
    """Rows that were read otherwise than they are written, by what was done."""


class ShardManifest(Record):
    """A whole split, committed by the existence of this record beside its shards."""

    schema_version: int = SCHEMA_VERSION
    key: str
    key_parts: dict[str, str]
    """Digest of each input that the key is made of; a miss names the part that changed."""
    split: str
    """train, eval, or eval_sets.NAME."""
    task: str
    sources: tuple[str, ...]
    """The files read; `file` in shards and ledgers is an index into this."""
    shards: tuple[ShardRecord, ...]
    tokenizer: str = "tokenizers"
    """The library that made the ids; which one never changes them."""
    fallback_reason: str | None = None
    """Where a faster library was caught giving other ids, so that the split was written without it."""
    entries: tuple[int, ...] = ()
    """For each source the entry of data.train that names it, where a mixture tells them apart."""
    class_names: tuple[str, ...] = ()
    """The order that the sources declare for their labels, if they do."""

    def numbers(self, name: str) -> Array:
        """One numeric field of all shards, int64 [shards]."""
        return np.array([getattr(shard, name) for shard in self.shards], dtype=np.int64)

    def total(self, name: str) -> int:
        """Sum of one numeric field (rows, tokens, targets, bytes, tokens_lost) over the shards."""
        return int(self.numbers(name).sum())

    @cached_property
    def outcomes(self) -> dict[str, int]:
        return _summed(shard.outcomes for shard in self.shards)

    @cached_property
    def labels(self) -> dict[str, int]:
        """Rows by label, over all shards, in the order of the logits: as the sources declare it, else integers by
        their value and names by the alphabet.
        """
        total = _summed(shard.labels for shard in self.shards)
        declared = [name for name in self.class_names if name in total]
        rest = [name for name in total if name not in self.class_names]
        numbers = sorted((name for name in rest if INTEGER.fullmatch(name)), key=int)
        names = [name for name in rest if not INTEGER.fullmatch(name)]
        return {name: total[name] for name in (*declared, *numbers, *names)}

    @property
    def notes(self) -> dict[str, int]:
        """Rows that were read otherwise than they are written, by what was done."""
        return _summed(shard.notes for shard in self.shards)

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
    """The splits of a job, ready to train on."""

    train: ShardManifest
    eval: ShardManifest
    beside: dict[str, ShardManifest] = {}
    """The sets of data.eval_sets."""

    @property
    def held(self) -> dict[str, ShardManifest]:
        """Every evaluation set by name; the deciding one first, without a name."""
        return {"": self.eval, **self.beside}

    @property
    def all(self) -> list[ShardManifest]:
        return [self.train, *self.held.values()]


def shards_folder(storage: Folder, key: str) -> Folder:
    """Where the shards of a key live; shared by all runs of the storage."""
    return storage / "shards" / key


def read_manifest(folder: Folder) -> ShardManifest | None:
    """The manifest of a committed set; None if there is none, or one of an earlier version, whose shards are written
    again. Raises DataError where it is damaged.
    """
    try:
        data = folder.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        return ShardManifest.model_validate_json(data)
    except ValidationError as error:
        with suppress(ValueError, AttributeError):
            if from_json(data).get("schema_version", 0) < SCHEMA_VERSION:
                return None
        raise DataError(
            f"{folder / MANIFEST} is damaged or of another version: {error}. Remove {folder} to shard again"
        ) from error


def write_manifest(folder: Folder, manifest: ShardManifest) -> None:
    folder.write_bytes(MANIFEST, manifest.model_dump_json(indent=1).encode())


def other_manifests(storage: Folder, key: str) -> Iterator[tuple[Folder, ShardManifest]]:
    """The committed sets of a storage but one; damaged ones are passed over, which concern other jobs."""
    for name in (storage / "shards").list():
        try:
            if name != key and (manifest := read_manifest(shards_folder(storage, name))):
                yield shards_folder(storage, name), manifest
        except DataError:
            continue


def check_labels(shards: Shards) -> None:
    """Refuse evaluation rows whose label training never saw. Raises DataError."""
    task, shown = load_task(shards.train.task), shards.train.labels
    for split in shards.held.values():
        unseen = {label: count for label, count in split.labels.items() if not task.knows(label, shown)}
        if not unseen:
            continue
        listed = ", ".join(f"{label!r} ({count} rows)" for label, count in list(unseen.items())[:10])
        known = ", ".join(repr(label) for label in list(shards.train.labels)[:10])
        raise DataError(
            f"labels in data.{split.split} that data.train never shows: {listed}. Known: {known}. "
            "Correct the labels, remove those rows, or add training rows with them"
        )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for own in counts:
        for name, count in own.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
