"""Finds committed checkpoints, checks their digests, and reads any span of any parameter from them, memory-mapped."""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from trainers.checkpoint.records import COMMITTED, HISTORY, MANIFEST, STATE, CheckpointManifest, CheckpointState
from trainers.runs import parse_step, step_name
from trainers.storage import Folder

CHUNK_BYTES = 1 << 24
TENSORS = ".safetensors"


def committed_steps(checkpoints: Folder) -> list[int]:
    """Steps with a commit marker, oldest first."""
    steps = [(parse_step(name), name) for name in checkpoints.list() if name.startswith("step-")]
    return [step for step, name in steps if step is not None and (checkpoints / name).exists(COMMITTED)]


def find_damage(folder: Folder, share: slice = slice(None)) -> str | None:
    """What is wrong with a committed checkpoint, or None.

    Args:
        share: which of its files to read; ranks split the work between them.
    """
    try:
        data = folder.read_bytes(MANIFEST)
        if xxhash.xxh3_128_hexdigest(data).encode() != folder.read_bytes(COMMITTED):
            return f"{MANIFEST} does not match {COMMITTED}"
        files = CheckpointManifest.model_validate_json(data).files
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    ranked = sorted(
        files, key=lambda name: (not name.endswith(TENSORS), name)
    )  # rank r of n checks rank r's file of n,
    for name in ranked[share]:  # whose bytes it is about to restore from: they come from storage once
        problem = _file_damage(folder, name, files[name].bytes, files[name].digest)
        if problem:
            return problem
    return None


def _file_damage(folder: Folder, name: str, size: int, digest: str) -> str | None:
    try:
        found = folder.size(name)
        if found != size:
            return f"{name} has {found} bytes, committed with {size}"
        running = xxhash.xxh3_128()
        with folder.open_input(name) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                running.update(chunk)
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None if running.hexdigest() == digest else f"{name} does not match its digest"


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
    checkpoints: Folder, damage_of: Callable[[Folder], str | None], emit: Callable[[Mapping[str, Any]], None] | None
) -> "CheckpointReader | None":
    """The newest committed checkpoint that is whole, or None where there is none.

    Args:
        damage_of: what is wrong with a checkpoint; the same answer on every rank.
        emit: on the one rank that sets damaged ones aside, told of each.
    """
    for step in reversed(committed_steps(checkpoints)):
        folder = checkpoints / step_name(step)
        damage = damage_of(folder)
        if damage is None:
            return CheckpointReader(folder)
        if emit:
            quarantine(checkpoints, step, damage)
            emit({"kind": "checkpoint_quarantined", "step": step, "reason": damage})
    return None


class CheckpointReader:
    """Reads spans of parameters from the rank files of one committed checkpoint."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.state = CheckpointState.model_validate_json(folder.read_bytes(STATE))
        manifest = CheckpointManifest.model_validate_json(folder.read_bytes(MANIFEST))
        self._downloads = None if folder.is_local else tempfile.TemporaryDirectory(prefix="tuneyard-")
        self._spans: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for name in sorted(manifest.files):
            if name.endswith(TENSORS):
                self._index(self._open(name))
        for spans in self._spans.values():
            spans.sort(key=lambda span: span[0])

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if self._downloads is None:
            return safe_open(self.folder.path / name, framework="pt")
        local = Path(self._downloads.name) / name
        with self.folder.open_input(name) as source, local.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        return safe_open(local, framework="pt")

    def _index(self, file: Any) -> None:
        starts = json.loads(file.metadata()["starts"])
        for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
            _, _, name = key.partition("/")
            shape = file.get_slice(key).get_shape()
            start = starts.get(name, 0)
            self._spans[key].append((start, start + (shape[0] if shape else 1), file))

    def read(self, kind: str, name: str, start: int, end: int) -> Any:
        """The fp32 values [start, end) of one flattened parameter. Raises ValueError where the files lack some."""
        import torch

        parts, cursor = [], start
        for low, high, file in self._spans[f"{kind}/{name}"]:
            if low <= cursor < min(high, end):
                stop = min(high, end)
                parts.append(file.get_slice(f"{kind}/{name}")[cursor - low : stop - low])
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
        for key, spans in self._spans.items():
            kind, _, name = key.partition("/")
            if kind == "buffer":
                yield name, spans[0][2].get_tensor(key)
