"""Digests of a model folder: listed when a version is registered, computed again by `tuneyard registry verify`."""

import xxhash

from trainers.checkpoint.export import PROVENANCE, Provenance
from trainers.checkpoint.records import FileRecord
from trainers.storage import Folder

PIECE_BYTES = 1 << 22


def list_files(source: Folder) -> dict[str, FileRecord]:
    """Every file of a model folder; the weights' digests are those that the export computed as it wrote them."""
    known = Provenance.model_validate_json(source.read_bytes(PROVENANCE)).files if source.exists(PROVENANCE) else {}
    return {name: known.get(name) or digest_file(source, name) for name in source.list()}


def digest_file(folder: Folder, name: str) -> FileRecord:
    """Size and xxh3-128 of a file. Raises FileNotFoundError."""
    hasher, size = xxhash.xxh3_128(), folder.size(name)
    with folder.open_input(name) as stream:
        while piece := stream.read(PIECE_BYTES):
            hasher.update(piece)
    return FileRecord(bytes=size, digest=hasher.hexdigest())
