"""The files of a checkpoint as one process reads them: in place, or downloaded from a bucket once and digested on the
way, so that checking and reading together cost one pass over the bytes.

Bytes are read, never mapped: an error of the storage under a mapped page kills the process.
"""

import os
import tempfile
from io import FileIO
from pathlib import Path

import xxhash

from trainers.patience import retrying
from trainers.storage import Folder

CHUNK_BYTES = 1 << 24


class LocalCopies:
    """The files of one checkpoint. Errors of reading are tried again for a while, then raised as OSError."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._scratch = None if folder.is_local else tempfile.TemporaryDirectory(prefix="tuneyard-")
        self._open: dict[str, FileIO] = {}
        self._downloaded: dict[str, str] = {}
        """Digest by name."""

    def digest(self, name: str) -> str:
        """xxh3-128 of a file's bytes as they are now."""
        self._open.pop(name, None)
        if self._scratch is not None:
            self._downloaded[name] = retrying(lambda: self._download(name), f"downloading {name} of {self.folder}")
            return self._downloaded[name]
        running, start, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(CHUNK_BYTES))
        while count := self._read(name, start, buffer):
            running.update(buffer[:count])
            start += count
        return running.hexdigest()

    def _download(self, name: str) -> str:
        assert self._scratch is not None
        running = xxhash.xxh3_128()
        with self.folder.open_input(name) as stream, (Path(self._scratch.name) / name).open("wb") as copy:
            while chunk := stream.read_buffer(CHUNK_BYTES):
                running.update(chunk)
                copy.write(chunk)
        return running.hexdigest()

    def forget(self, name: str) -> None:
        """Have the next reading of a file ask the storage, and not this host's memory of it."""
        if self.folder.is_local and name in self._open:
            file = self._open.pop(name)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fill(self, name: str, start: int, buffer: memoryview) -> None:
        """Read the bytes from `start` on until the buffer is full. Raises ValueError where the file ends before."""
        if self._scratch is not None and name not in self._downloaded:
            self.digest(name)
        filled = 0
        while filled < len(buffer):
            count = self._read(name, start + filled, buffer[filled:])
            if not count:
                raise ValueError(f"{name} of {self.folder} ends at {start + filled}, bytes after that are asked for")
            filled += count

    def _read(self, name: str, start: int, buffer: memoryview) -> int:
        return retrying(lambda: self._read_once(name, start, buffer), f"reading {name} of {self.folder}")

    def _read_once(self, name: str, start: int, buffer: memoryview) -> int:
        if name not in self._open:
            folder = self.folder.path if self._scratch is None else Path(self._scratch.name)
            self._open[name] = (folder / name).open("rb", buffering=0)
        try:
            return os.preadv(self._open[name].fileno(), [buffer], start)
        except OSError:  # a stale handle stays stale: the next try opens the file anew
            del self._open[name]
            raise

    def header(self, name: str) -> bytes:
        """The JSON header of a safetensors file, which of a bucket is all that is fetched."""

        if self.folder.is_local or name in self._downloaded:
            length = bytearray(8)
            self.fill(name, 0, memoryview(length))
            text = bytearray(int.from_bytes(length, "little"))
            self.fill(name, 8, memoryview(text))
            return bytes(text)

        def fetch() -> bytes:
            with self.folder.open_input(name) as stream:
                return bytes(stream.read(int.from_bytes(stream.read(8), "little")))

        return retrying(fetch, f"reading {name} of {self.folder}")
