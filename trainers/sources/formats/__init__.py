"""File formats, one small file each. To add one: implement `Format`, enter it here and in `sources.SUFFIXES`."""

from trainers.job.schema import FormatName
from trainers.sources.formats.base import Format, RawRow, Span
from trainers.sources.formats.columnar import ArrowIpc, Parquet
from trainers.sources.formats.conll import Conll
from trainers.sources.formats.delimited import Delimited
from trainers.sources.formats.document import Document
from trainers.sources.formats.lines import Lines
from trainers.sources.formats.parallel import Parallel

FORMATS: dict[FormatName, Format] = {
    "jsonl": Lines(),
    "text": Lines(),
    "json": Document(),
    "csv": Delimited(),
    "tsv": Delimited(),
    "parquet": Parquet(),
    "arrow": ArrowIpc(),
    "conll": Conll(),
    "parallel": Parallel(),
}

__all__ = ["FORMATS", "Format", "RawRow", "Span"]
