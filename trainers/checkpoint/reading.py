"""Reads any span of any parameter from the rank files of a committed checkpoint."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from trainers.checkpoint.damage import TENSORS, read_manifest, wait_for_file
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.records import COMMITTED, HISTORY, STATE, CheckpointManifest, CheckpointState
from trainers.patience import retrying
from trainers.run.events import StepEvent
from trainers.run.folder import parse_step
from trainers.storage import Folder
from trainers.tensor_file import TORCH_NAMES


def committed_steps(checkpoints: Folder) -> list[int]:
    """Steps with a commit marker, oldest first."""

    def read() -> list[int]:
        steps = [(parse_step(name), name) for name in checkpoints.list() if name.startswith("step-")]
        return [step for step, name in steps if step is not None and COMMITTED in (checkpoints / name).list()]

    return retrying(read, f"listing {checkpoints}")


@dataclass(frozen=True)
class Stored:
    """One tensor of a rank's file: the values [start, end) of a flattened parameter, or a buffer."""

    start: int
    end: int
    file: str
    offset: int
    """Its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]


class CheckpointReader:
    """Reads spans of parameters from the rank files of one committed checkpoint; opens those that it needs."""

    def __init__(self, files: LocalCopies, manifest: CheckpointManifest | None = None) -> None:
        """Raises OSError where this host cannot read the checkpoint, or does not see what was committed."""
        self.folder, self._files = files.folder, files
        self._manifest = manifest or read_manifest(files.folder)
        self.state = CheckpointState.model_validate_json(self._text(STATE))
        self._stored: dict[str, list[Stored]] = defaultdict(list)
        for name in sorted(self._manifest.files):
            if name.endswith(TENSORS):
                self._index(name)
        for parts in self._stored.values():
            parts.sort(key=lambda stored: stored.start)

    def _demand(self, name: str, by_digest: bool) -> None:
        problem = wait_for_file(self._files, name, self._manifest.files[name], by_digest)
        if problem:
            raise OSError(f"this host does not see {self.folder} as it was committed: {problem}")

    def _text(self, name: str) -> bytes:
        """A small file, as committed."""
        data = retrying(lambda: self.folder.read_bytes(name), f"reading {name} of {self.folder}")
        if xxhash.xxh3_128_hexdigest(data) != self._manifest.files[name].digest:
            self._demand(name, by_digest=True)
            data = retrying(lambda: self.folder.read_bytes(name), f"reading {name} of {self.folder}")
        return data

    def _index(self, name: str) -> None:
        """Note what a file holds, from its header alone."""
        self._demand(name, by_digest=False)
        text = self._files.header(name)
        header = json.loads(text)
        starts = json.loads(header.pop("__metadata__")["starts"])
        for key, entry in header.items():
            start, shape = starts.get(key.partition("/")[2], 0), tuple(entry["shape"])
            offset = 8 + len(text) + entry["data_offsets"][0]
            end = start + (shape or (1,))[0]
            self._stored[key].append(Stored(start, end, name, offset, TORCH_NAMES[entry["dtype"]], shape))

    def _load(self, stored: Stored, start: int, end: int) -> Any:
        """Rows [start, end) of a stored tensor."""
        import torch

        shape = (end - start, *stored.shape[1:]) if stored.shape else ()
        values = torch.empty(shape, dtype=getattr(torch, stored.dtype))
        if values.nbytes:
            row = values.nbytes // max(end - start, 1)
            raw = memoryview(values.view(-1).view(torch.uint8).numpy()).cast("B")
            self._files.fill(stored.file, stored.offset + row * start, raw)
        return values

    def read(self, kind: str, name: str, start: int, end: int) -> Any:
        """The fp32 values [start, end) of one flattened parameter. Raises ValueError where the files lack some."""
        import torch

        parts, cursor = [], start
        for stored in self._stored[f"{kind}/{name}"]:
            if stored.start <= cursor < min(stored.end, end):
                stop = min(stored.end, end)
                parts.append(self._load(stored, cursor - stored.start, stop - stored.start))
                cursor = stop
        if cursor < end:
            raise ValueError(f"{self.folder}: {kind}/{name} has no values from {cursor} to {end}")
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def holds(self, kind: str, name: str) -> bool:
        """Whether a parameter is in the files at all: those that adapters leave alone are not."""
        return bool(self._stored.get(f"{kind}/{name}"))

    def history(self) -> list[StepEvent]:
        """Events of the last steps before this checkpoint, oldest first."""
        return [StepEvent.model_validate(event) for event in json.loads(self._text(HISTORY))]

    def buffers(self) -> Iterable[tuple[str, Any]]:
        """Persistent buffers by name."""
        for key, (stored, *_) in self._stored.items():
            kind, _, name = key.partition("/")
            if kind == "buffer":
                yield name, self._load(stored, stored.start, stored.end)
