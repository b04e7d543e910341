"""The files of a checkpoint where they can be memory-mapped: in place, or downloaded from a bucket once and digested
on the way, so that checking and reading together cost one pass over the bytes."""

import tempfile
from pathlib import Path

import xxhash

from trainers.storage import Folder

CHUNK_BYTES = 1 << 24


class LocalCopies:
    """The files of one checkpoint, as one process has need of them."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._scratch = None if folder.is_local else tempfile.TemporaryDirectory(prefix="tuneyard-")
        self._digests: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where a file can be mapped."""
        if self._scratch is None:
            return self.folder.path / name
        if name not in self._digests:
            self.digest(name)
        return Path(self._scratch.name) / name

    def digest(self, name: str) -> str:
        """xxh3-128 of a file's bytes as they are now."""
        running = xxhash.xxh3_128()
        copy = None if self._scratch is None else (Path(self._scratch.name) / name).open("wb")
        try:
            with self.folder.open_input(name) as stream:
                while chunk := stream.read_buffer(CHUNK_BYTES):
                    running.update(chunk)
                    if copy is not None:
                        copy.write(chunk)
        finally:
            if copy is not None:
                copy.close()
        self._digests[name] = running.hexdigest()
        return self._digests[name]
