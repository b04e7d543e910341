"""Where an input row stands, as a person looks it up."""

from pathlib import Path

from trainers.job.schema import FormatName
from trainers.sources.files import compression_of, format_of

MOST_COUNTED_BYTES = 1 << 26
"""Of a file, whose lines are counted up to a row."""


def place_of(uri: str, row: int, format: FormatName | None = None) -> str:
    """Where a row stands, for people: file and line where the file is at hand, else as the ledger counts.

    Args:
        row: byte offset of the line for jsonl and text, row number from 0 for the others.
        format: of the file, where its name does not tell it.
    """
    name = uri.rpartition("/")[2]
    if (format or format_of(uri)) not in ("jsonl", "text"):
        return f"{name}, row {row} from 0"
    if row > MOST_COUNTED_BYTES or compression_of(uri) or not Path(uri).is_file():
        return f"{name}, byte {row}"
    with Path(uri).open("rb") as stream:
        return f"{name}:{stream.read(row).count(10) + 1}"
