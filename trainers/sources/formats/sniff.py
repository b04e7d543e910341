"""What a file looks like by its first bytes, for messages about files that are not what their name says."""

from dataclasses import replace

import pyarrow as pa

from trainers.errors import DataError
from trainers.sources.files import SourceFile
from trainers.sources.formats.base import not_as_named, open_stream

HEAD_BYTES = 2**16
BINARY_SHARE = 0.01
"""Share of zero bytes above which a head is not text (UTF-16 has half)."""
MAGICS = (
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
    (b"\x7fELF", "a program"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
)


def recognize(head: bytes) -> str | None:
    """The kind of file that the first bytes give away, or None for what may be plain text."""
    for magic, kind in MAGICS:
        if head.startswith(magic):
            return kind
    return "binary data" if head.count(0) > len(head) * BINARY_SHARE else None


def read_text_head(source: SourceFile, expected: str) -> bytes:
    """The first decompressed bytes of a text format. Raises DataError where they are plainly something else."""
    try:
        with open_stream(source) as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, pa.ArrowException) as error:
        expected = f"{source.compression}-compressed {expected}" if source.compression else expected
        raise unreadable(source, expected, error) from error
    if kind := recognize(head):
        raise not_as_named(source, expected, kind, RENAME)
    return head


def unreadable(source: SourceFile, expected: str, error: Exception) -> DataError:
    """The error for a file whose format or compression cannot be read: it is another's, or is cut short or damaged."""
    plain = replace(source, compression=None)
    with open_stream(plain) as stream:
        head = stream.read(HEAD_BYTES)
    found = recognize(head) if head else "an empty file"
    if found and found == KINDS.get(source.compression or source.format):
        return DataError(f"{source.uri}: {found} that is cut short or damaged ({error}). Fetch or write it again")
    return not_as_named(source, expected, found or str(error), RENAME)


KINDS = {"gzip": "gzip data", "zstd": "Zstandard data", "parquet": "a Parquet file", "arrow": "an Arrow file"}
"""What files of a format or compression are by their first bytes."""
RENAME = "Write it again, name it for what it is, or set data.format"
