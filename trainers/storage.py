"""A folder on any file system that pyarrow knows (local, s3://, gs://, hdfs://); writes are whole or absent.

A local file is written under a temporary name, synced and renamed; on hdfs:// it is renamed too; on an object store a
put is atomic by itself. A `Folder` is a name, not a connection, so it travels between processes.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from trainers.credentials import all_known, hide_credentials, learn, put_back, take_out
from trainers.errors import JobError
from trainers.records import Array

TEMPORARY = ".tmp-"
"""Prefix of files that are not whole yet; readers ignore them."""
GS_RETRY, GS_RETRY_S = "retry_limit_seconds", 60
"""How long gs:// is asked again; pyarrow itself gives an unreachable place up after 15 minutes."""
HDFS, CONNECTING = "hdfs://", Lock()


def is_remote(path: str) -> bool:
    """True for URIs such as s3://bucket/key; file:// and plain paths are local."""
    return "://" in path and not path.startswith("file://")


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system that holds `path`, and the path as it writes it; OSError where it cannot be reached now."""
    if not is_remote(path):
        return pafs.LocalFileSystem(), str(Path(path.removeprefix("file://")).absolute())
    shown, path = take_out(path), put_back(take_out(path))
    if path.startswith(("gs://", "gcs://")) and GS_RETRY not in path:
        path += f"{'&' if '?' in path else '?'}{GS_RETRY}={GS_RETRY_S}"
    try:
        if path.startswith(HDFS):
            place, question, options = path.removeprefix(HDFS).partition("?")
            host, _, inner = place.partition("/")
            with CONNECTING:  # of two made at once one would end
                return _hdfs(host, question + options), f"/{inner.strip('/')}"
        fs, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError, NotImplementedError) as error:
        cause = hide_credentials(str(error))
        said = f"cannot use {shown!r}: {cause}. Local paths, s3://, gs:// and hdfs:// are understood"
        raise (OSError(error.errno or EIO, said) if isinstance(error, OSError) else JobError(said)) from None
    return fs, str(inner)


@cache
def _hdfs(host: str, options: str) -> pafs.FileSystem:
    """One connection a process: a stream does not keep its file system, and ends with it. No host: fs.defaultFS.
    Raises OSError where no name node answers: pyarrow calls each file of such a place absent."""
    fs = pafs.FileSystem.from_uri(f"{HDFS}{host}/{options}")[0] if host else pafs.HadoopFileSystem("default")
    if fs.get_file_info("/").type == pafs.FileType.NotFound:
        raise OSError("no name node answers")
    return fs


@dataclass(frozen=True)
class Folder:
    """One folder of storage, local or remote."""

    uri: str
    """Without credentials; `filesystem_of` knows them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", take_out(self.uri))

    def __reduce__(self) -> tuple[Any, ...]:
        return _folder, (self.uri, all_known())

    def __truediv__(self, name: str) -> "Folder":
        place, question, options = self._split()
        return Folder(f"{place.rstrip('/')}/{name}{question}{options}")

    def _split(self) -> tuple[str, str, str]:
        """The place and the options of a URI, such as ?endpoint_override=host:port; a local path has none."""
        return (self.uri, "", "") if self.is_local else self.uri.partition("?")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return PurePosixPath(self._split()[0]).name

    @property
    def parent(self) -> "Folder":
        place, question, options = self._split()
        return Folder(f"{place.rstrip('/').rpartition('/')[0]}{question}{options}")

    @property
    def is_local(self) -> bool:
        return not is_remote(self.uri)

    @property
    def path(self) -> Path:
        """The local path. Raises AssertionError for remote storage, where none exists."""
        assert self.is_local, f"{self.uri} has no local path"
        return Path(self.uri.removeprefix("file://"))

    def _resolve(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        fs, root = filesystem_of(self.uri)
        return fs, f"{root}/{name}" if name else root

    def exists(self, name: str = "") -> bool:
        fs, path = self._resolve(name)
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int:
        fs, path = self._resolve(name)
        info = fs.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(path)
        return int(info.size)

    def list(self) -> list[str]:
        """Names directly below this folder, sorted, temporary files left out; empty where the folder does not exist.

        A name is given as soon as the folder has it: to ask for one that is absent makes NFS and FUSE remember that.
        """
        fs, path = self._resolve()
        try:
            if self.is_local:
                names = [entry.name for entry in Path(path).iterdir()]
            else:
                names = [info.base_name for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))]
        except FileNotFoundError:  # hdfs:// raises it for a folder that appears at this moment
            return []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def refresh(self) -> None:
        """See what other hosts wrote: an NFS client that changes a folder forgets the names it remembered of it."""
        if self.is_local and self.path.is_dir():
            probe = self.path / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
            probe.touch()
            probe.unlink(missing_ok=True)

    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        fs, path = self._resolve(name)
        if isinstance(fs, pafs.HadoopFileSystem) and fs.get_file_info(path).type == pafs.FileType.NotFound:
            raise FileNotFoundError(path)  # to open it would print a page of Java's stack
        with fs.open_input_file(path) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def open_input(self, name: str) -> pa.NativeFile:
        """A seekable stream, memory-mapped where the storage is local."""
        if self.is_local:
            return pa.memory_map(str(self.path / name))
        fs, path = self._resolve(name)
        return fs.open_input_file(path)

    @contextmanager
    def open_output(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream whose file appears under `name`, whole and synced, when the block ends without an exception."""
        staged = self.stage_output(name)
        try:
            yield staged.stream
            staged.commit()
            if staged.final is not None:
                _sync(staged.final.parent)
        finally:
            staged.discard()

    def stage_output(self, name: str) -> "StagedFile":
        """A file that appears when it is committed; for writers that commit several and sync the folder once."""
        fs, path = self._resolve(name)
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        final = Path(path)
        partial = final.parent / f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}"
        if isinstance(fs, pafs.HadoopFileSystem):  # shows a file while it is written
            return MovedFile(fs.open_output_stream(str(partial), compression=None), None, None, fs, str(partial), path)
        if not self.is_local:
            return StagedFile(fs.open_output_stream(path, compression=None), None, None)  # as it is, also *.gz
        return StagedFile(pa.OSFile(str(partial), "wb"), partial, final)

    def sync(self) -> None:
        """Make the names of committed files durable; object stores have nothing to sync."""
        if self.is_local and self.path.is_dir():
            _sync(self.path)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.open_output(name) as stream:
            stream.write(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all it holds; nothing happens where it does not exist."""
        fs, path = self._resolve(name)
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            shutil.rmtree(path, ignore_errors=True) if self.is_local else fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)

    def check_writable(self) -> None:
        """Create the folder and write one small file. Raises JobError that names the remedy."""
        probe = f"probe-{uuid.uuid4().hex[:8]}"
        try:
            self.write_bytes(probe, b"")
            self.delete(probe)
        except (OSError, pa.ArrowException) as error:
            raise JobError(
                f"storage {self.uri!r} cannot be written ({error}): name a folder or bucket you may write to"
            ) from error


def _folder(uri: str, credentials: dict[str, dict[str, str]]) -> Folder:
    """A folder that comes from another process, which knew these credentials."""
    learn(credentials)
    return Folder(uri)


@dataclass(frozen=True)
class StagedFile:
    """A file being written that nobody can see yet."""

    stream: pa.NativeFile
    partial: Path | None
    """Its temporary name; None on object stores, where closing the stream is what makes the object appear."""
    final: Path | None

    def commit(self, durable: bool = True) -> None:
        """Close it, sync its content unless told otherwise, and give it its name."""
        self.stream.close()
        if self.partial is not None and self.final is not None:
            if durable:
                _sync(self.partial)
            self.partial.replace(self.final)

    def discard(self) -> None:
        if self.partial is not None:
            self.stream.close()
            self.partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class MovedFile(StagedFile):
    """A file on hdfs://, written under a temporary name and moved; one that it replaces is absent for a moment."""

    fs: pafs.FileSystem
    source: str
    target: str

    def commit(self, durable: bool = True) -> None:
        self.stream.close()
        self.fs.move(self.source, self.target)

    def discard(self) -> None:
        self.stream.close()
        if self.fs.get_file_info(self.source).type == pafs.FileType.File:
            self.fs.delete_file(self.source)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def array_bytes(array: Array) -> bytes:
    """An array as a file of numpy's own format."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save_array(folder: Folder, name: str, array: Array) -> None:
    folder.write_bytes(name, array_bytes(array))


def load_array(folder: Folder, name: str) -> Array:
    """Read an array back. Raises FileNotFoundError."""
    array: Array
    if folder.is_local:
        array = np.load(folder.path / name, mmap_mode="r")
    else:
        array = np.load(io.BytesIO(folder.read_bytes(name)))
    return array
