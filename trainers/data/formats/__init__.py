"""File formats, one small file each. To add one: implement `Format`, enter it here and in `sources.SUFFIXES`."""

from trainers.data.formats.base import Format, RawRow, Span
from trainers.data.formats.columnar import ArrowIpc, Parquet
from trainers.data.formats.delimited import Delimited
from trainers.data.formats.document import Document
from trainers.data.formats.lines import Lines
from trainers.job import FormatName

FORMATS: dict[FormatName, Format] = {
    "jsonl": Lines(),
    "text": Lines(),
    "json": Document(),
    "csv": Delimited(),
    "tsv": Delimited(),
    "parquet": Parquet(),
    "arrow": ArrowIpc(),
}

__all__ = ["FORMATS", "Format", "RawRow", "Span"]
