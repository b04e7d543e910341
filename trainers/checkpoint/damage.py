"""What contradicts a checkpoint's record: only that is damage. What cannot be read, or not yet be seen by this host, is
an OSError."""

import errno
import time
from dataclasses import dataclass

import xxhash

from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.records import COMMITTED, MANIFEST, CheckpointManifest, FileRecord
from trainers.patience import VIEW_POLL_S, retrying, view_delay_s
from trainers.storage import Folder

TENSORS = ".safetensors"


class Damaged(Exception):
    """A checkpoint whose content contradicts its record; the message says where."""


@dataclass(frozen=True)
class Finding:
    """What one rank has against a checkpoint: a file that contradicts its record, or one that cannot be read."""

    file: str
    damage: str | None = None
    error: OSError | None = None


def read_manifest(folder: Folder) -> CheckpointManifest:
    """The manifest that was committed.

    Raises:
        Damaged: where it is missing, or not what the marker says, for longer than this host may see an old state.
    """
    deadline = time.monotonic() + _delay_s(folder)
    while True:
        try:
            marker = retrying(lambda: folder.read_bytes(COMMITTED), f"reading {COMMITTED} of {folder}")
            data = retrying(lambda: folder.read_bytes(MANIFEST), f"reading {MANIFEST} of {folder}")
            if xxhash.xxh3_128_hexdigest(data).encode() == marker:
                return CheckpointManifest.model_validate_json(data)
            problem = f"{MANIFEST} does not match {COMMITTED}"
        except (FileNotFoundError, ValueError) as error:
            problem = f"its manifest cannot be used: {error}"
        if time.monotonic() >= deadline:
            _check_listing(folder, MANIFEST, problem)
            raise Damaged(problem)
        _look_again(folder)


def check_files(files: LocalCopies, manifest: CheckpointManifest, share: slice = slice(None)) -> Finding | None:
    """The first file of a share that is not what its record says, or that cannot be read.

    Args:
        share: which files to read. Rank r of n checks the file of rank r of n, from which it is about to restore: its
            bytes come from storage once.
    """
    for name in sorted(manifest.files, key=lambda name: (not name.endswith(TENSORS), name))[share]:
        try:
            damage = wait_for_file(files, name, manifest.files[name])
        except OSError as error:
            return Finding(name, error=error)
        if damage:
            return Finding(name, damage)
    return None


def wait_for_file(files: LocalCopies, name: str, record: FileRecord, by_digest: bool = True) -> str | None:
    """What contradicts a file's record after all the time for which this host may see an old state of it, or None.

    Args:
        by_digest: read its bytes; otherwise its size is compared alone.
    """
    deadline = time.monotonic() + _delay_s(files.folder)
    compared_size: int | None = -1
    while True:
        last = time.monotonic() >= deadline
        size = _size(files.folder, name)
        if last or size != compared_size:  # bytes are read again when there may be others
            damage, compared_size = compare(files, name, record, by_digest), size
            if last and damage:
                _check_listing(files.folder, name, damage)
            if last or damage is None:
                return damage
        _look_again(files.folder)


def compare(files: LocalCopies, name: str, record: FileRecord, by_digest: bool = True) -> str | None:
    """What contradicts a file's record, as this host sees it now."""
    size = _size(files.folder, name)
    if size is None:
        return f"{name} is missing"
    if size != record.bytes:
        return f"{name} has {size} bytes, committed with {record.bytes}"
    try:
        return None if not by_digest or files.digest(name) == record.digest else f"{name} does not match its digest"
    except FileNotFoundError:
        return f"{name} is missing"


def find_damage(files: LocalCopies, share: slice = slice(None)) -> str | None:
    """What is wrong with a committed checkpoint, or None. Raises OSError where it cannot be read."""
    try:
        finding = check_files(files, read_manifest(files.folder), share)
    except Damaged as damaged:
        return str(damaged)
    if finding and finding.error:
        raise finding.error
    return finding.damage if finding else None


def _size(folder: Folder, name: str) -> int | None:
    try:
        return retrying(lambda: folder.size(name), f"looking at {name} of {folder}")
    except FileNotFoundError:
        return None


def _check_listing(folder: Folder, name: str, problem: str) -> None:
    """A name that is listed and cannot be opened is no damage."""
    if name in retrying(folder.list, f"listing {folder}") and not folder.exists(name):
        raise OSError(errno.ESTALE, f"this host lists {name} of {folder} and cannot open it: {problem}")


def _delay_s(folder: Folder) -> float:
    return view_delay_s(folder.path) if folder.is_local else 0.0


def _look_again(folder: Folder) -> None:
    time.sleep(VIEW_POLL_S)
    retrying(folder.refresh, f"looking at {folder}")
