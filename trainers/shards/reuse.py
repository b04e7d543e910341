"""Shards taken over from other sets of the storage: a unit with the same digest gives the same bytes again."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from trainers.shards.files import counts_name, ledger_name, record_name, shard_name
from trainers.shards.keys import SplitPlan
from trainers.shards.manifest import ShardManifest
from trainers.shards.writer import finished_shard
from trainers.sources.readers import Unit
from trainers.storage import Folder


def explain_miss(plan: SplitPlan, others: Mapping[Folder, ShardManifest]) -> str | None:
    """Which parts of the key differ from those of the most similar set; None if none is similar."""
    changes: list[tuple[int, str, list[str]]] = []
    for folder, manifest in others.items():
        if manifest.split == plan.name:
            changed = [part for part, digest in plan.key_parts.items() if manifest.key_parts.get(part) != digest]
            changes.append((len(changed), folder.name, changed))
    count, name, changed = min(changes, default=(len(plan.key_parts), "", []))
    if count > len(plan.key_parts) // 2:
        return None
    return f"the {plan.name} shards {name} do not fit any more: {' and '.join(changed)} changed"


def adopt_shards(folder: Folder, plan: SplitPlan, units: Sequence[Unit], others: Mapping[Folder, ShardManifest]) -> int:
    """Take over what other sets hold of the units that are not here yet. Returns the number of shards taken over."""
    names_here = set(folder.list())
    missing = {plan.unit_digest(unit): unit.index for unit in units if record_name(unit.index) not in names_here}
    before = len(missing)
    for other, manifest in others.items():
        for number_there, record in enumerate(manifest.shards):
            if record.unit not in missing or not finished_shard(other, number_there):
                continue
            number = missing.pop(record.unit)
            names = {"file": shard_name(number), "ledger": ledger_name(number)}
            for old, new in ((record.file, names["file"]), (record.ledger, names["ledger"]),
                             (counts_name(number_there), counts_name(number))):  # fmt: skip
                _copy(other, old, folder, new)
            folder.write_bytes(record_name(number), record.model_copy(update=names).model_dump_json().encode())
    return before - len(missing)


def _copy(other: Folder, old: str, folder: Folder, new: str) -> None:
    """Give a file a second name, which costs no room, or copy it where the storage has no such thing."""
    if folder.is_local and other.is_local:
        (folder.path / new).unlink(missing_ok=True)
        with suppress(OSError):  # some network file systems have no second names
            os.link(other.path / old, folder.path / new)
            return
    folder.write_bytes(new, other.read_bytes(old))
