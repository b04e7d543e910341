"""Finds committed checkpoints, checks their digests, and reads any span of any parameter from them, memory-mapped."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.records import (
    COMMITTED,
    HISTORY,
    MANIFEST,
    STATE,
    CheckpointManifest,
    CheckpointState,
    FileRecord,
)
from trainers.run.folder import parse_step, step_name
from trainers.storage import Folder

TENSORS = ".safetensors"


def committed_steps(checkpoints: Folder) -> list[int]:
    """Steps with a commit marker, oldest first."""
    steps = [(parse_step(name), name) for name in checkpoints.list() if name.startswith("step-")]
    return [step for step, name in steps if step is not None and (checkpoints / name).exists(COMMITTED)]


def find_damage(files: LocalCopies, share: slice = slice(None)) -> str | None:
    """What is wrong with a committed checkpoint, or None.

    Args:
        share: which of its files to read; ranks split the work between them.
    """
    folder = files.folder
    try:
        data = folder.read_bytes(MANIFEST)
        if xxhash.xxh3_128_hexdigest(data).encode() != folder.read_bytes(COMMITTED):
            return f"{MANIFEST} does not match {COMMITTED}"
        records = CheckpointManifest.model_validate_json(data).files
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    # rank r of n checks the file of rank r of n, from which it is about to restore: its bytes come from storage once
    ranked = sorted(records, key=lambda name: (not name.endswith(TENSORS), name))
    problems = (_file_damage(files, name, records[name]) for name in ranked[share])
    return next((problem for problem in problems if problem), None)


def _file_damage(files: LocalCopies, name: str, record: FileRecord) -> str | None:
    try:
        found = files.folder.size(name)
        if found != record.bytes:
            return f"{name} has {found} bytes, committed with {record.bytes}"
        return None if files.digest(name) == record.digest else f"{name} does not match its digest"
    except OSError as error:
        return f"{name} cannot be read: {error}"


def quarantine(checkpoints: Folder, step: int, reason: str) -> None:
    """Take a damaged checkpoint out of the readers' sight, with the reason beside it."""
    folder = checkpoints / step_name(step)
    folder.write_bytes("QUARANTINED", reason.encode())
    folder.delete(COMMITTED)
    if folder.is_local:
        target = folder.path.with_name(f"damaged-{folder.name}")
        shutil.rmtree(target, ignore_errors=True)
        folder.path.rename(target)


def open_newest(
    checkpoints: Folder,
    damage_of: Callable[[LocalCopies], str | None],
    emit: Callable[[Mapping[str, Any]], None] | None,
) -> "CheckpointReader | None":
    """The newest committed checkpoint that is whole, or None where there is none.

    Args:
        damage_of: what is wrong with a checkpoint; the same answer on every rank.
        emit: on the one rank that sets damaged ones aside, told of each.
    """
    for step in reversed(committed_steps(checkpoints)):
        files = LocalCopies(checkpoints / step_name(step))
        damage = damage_of(files)
        if damage is None:
            return CheckpointReader(files)
        if emit:
            quarantine(checkpoints, step, damage)
            emit({"kind": "checkpoint_quarantined", "step": step, "reason": damage})
    return None


@dataclass(frozen=True)
class Stored:
    """One tensor of a rank's file: the values [start, end) of a flattened parameter, or a buffer."""

    start: int
    end: int
    file: str


class CheckpointReader:
    """Reads spans of parameters from the rank files of one committed checkpoint; opens those that it needs."""

    def __init__(self, files: LocalCopies) -> None:
        self.folder, self._files = files.folder, files
        self.state = CheckpointState.model_validate_json(self.folder.read_bytes(STATE))
        manifest = CheckpointManifest.model_validate_json(self.folder.read_bytes(MANIFEST))
        self._open: dict[str, Any] = {}
        self._stored: dict[str, list[Stored]] = defaultdict(list)
        for name in sorted(manifest.files):
            if name.endswith(TENSORS):
                self._index(name)
        for stored in self._stored.values():
            stored.sort(key=lambda one: one.start)

    def _index(self, name: str) -> None:
        """Note what a file holds, from its header alone."""
        with self.folder.open_input(name) as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        starts = json.loads(header.pop("__metadata__")["starts"])
        for key, entry in header.items():
            start = starts.get(key.partition("/")[2], 0)
            self._stored[key].append(Stored(start, start + (entry["shape"] or [1])[0], name))

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(self._files.path(name), framework="pt")
        return self._open[name]

    def read(self, kind: str, name: str, start: int, end: int) -> Any:
        """The fp32 values [start, end) of one flattened parameter. Raises ValueError where the files lack some."""
        import torch

        parts, cursor = [], start
        for stored in self._stored[f"{kind}/{name}"]:
            if stored.start <= cursor < min(stored.end, end):
                stop = min(stored.end, end)
                tensor = self._file(stored.file).get_slice(f"{kind}/{name}")
                parts.append(tensor[cursor - stored.start : stop - stored.start])
                cursor = stop
        if cursor < end:
            raise ValueError(f"{self.folder}: {kind}/{name} has no values from {cursor} to {end}")
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def history(self) -> list[dict[str, Any]]:
        """Events of the last steps before this checkpoint, oldest first."""
        events: list[dict[str, Any]] = self.folder.read_json(HISTORY)
        return events

    def buffers(self) -> Iterable[tuple[str, Any]]:
        """Persistent buffers by name."""
        for key, stored in self._stored.items():
            kind, _, name = key.partition("/")
            if kind == "buffer":
                yield name, self._file(stored[0].file).get_tensor(key)
