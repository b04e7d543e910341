"""Shards taken over from an earlier set that differs in its sources alone: a unit of a file that has not changed, and
that stands at the same place among the files, gives the same bytes again. Begin at `adopt_shards`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from trainers.shards.files import ledger_name, record_name, shard_name
from trainers.shards.keys import KEY, SplitPlan, identity_of
from trainers.shards.manifest import MANIFEST, read_manifest
from trainers.shards.shard_table import ShardRecord
from trainers.shards.writer import finished_shard
from trainers.sources.readers import Unit
from trainers.storage import Folder


def adopt_shards(storage: Folder, folder: Folder, plan: SplitPlan, units: Sequence[Unit]) -> int:
    """Take over what earlier sets of the storage hold of the units that are not here yet.

    Not where repeats are left out: whether a row is one depends on all files.

    Returns:
        The number of shards taken over.
    """
    if plan.dedup:
        return 0
    held, count = set(folder.list()), 0
    for other, sources in _alike(storage, plan):
        same = {file for file, (one, two) in enumerate(zip(sources, identity_of(plan), strict=False)) if one == two}
        todo = [unit for unit in units if unit.file in same and record_name(unit.index) not in held]
        for unit, record in _pairs(todo, units, other):
            _take(other, folder, unit.index, record)
            held.add(record_name(unit.index))
            count += 1
    return count


def _alike(storage: Folder, plan: SplitPlan) -> Iterator[tuple[Folder, list[Any]]]:
    """Committed sets whose key differs in the sources alone, with the identity of each source."""
    wanted = {name: digest for name, digest in plan.key_parts.items() if name != "sources"}
    shelf = storage / "shards"
    for name in shelf.list():
        folder = shelf / name
        if name == plan.key or not folder.exists(KEY) or not folder.exists(MANIFEST):
            continue
        said: dict[str, Any] = folder.read_json(KEY)
        parts = {part: digest for part, digest in said["key_parts"].items() if part != "sources"}
        if said["split"] == plan.name and parts == wanted and "sources" in said:
            yield folder, said["sources"]


def _pairs(todo: Sequence[Unit], units: Sequence[Unit], other: Folder) -> Iterator[tuple[Unit, ShardRecord]]:
    """Each unit with the shard that holds it there, if that is whole: the shards of a file are its units in order."""
    manifest = read_manifest(other) if todo else None
    if manifest is None:
        return
    first: dict[int, int] = {}
    for unit in units:
        first.setdefault(unit.file, unit.index)
    there: dict[int, int] = {}
    for place, file in enumerate(manifest.shards.numbers("source").tolist()):
        there.setdefault(file, place)
    for unit in todo:
        if record := finished_shard(other, there[unit.file] + unit.index - first[unit.file]):
            yield unit, record


def _take(other: Folder, folder: Folder, number: int, record: ShardRecord) -> None:
    names = {"file": shard_name(number), "ledger": ledger_name(number)}
    for kind, name in names.items():
        _copy(other, getattr(record, kind), folder, name)
    folder.write_bytes(record_name(number), record.model_copy(update=names).model_dump_json().encode())


def _copy(other: Folder, old: str, folder: Folder, new: str) -> None:
    """Give a file a second name, which costs no room, or copy it where the storage has no such thing."""
    if folder.is_local and other.is_local:
        (folder.path / new).unlink(missing_ok=True)
        with suppress(OSError):  # some network file systems have no second names
            os.link(other.path / old, folder.path / new)
            return
    folder.write_bytes(new, other.read_bytes(old))
