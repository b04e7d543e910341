"""What the data tests need: files of every format, jobs on tiny tokenizers, and the data stage without Ray."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import shard_locally
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.shards.manifest import Shards
from trainers.sources.files import SourceFile, find_sources

Rows = Sequence[dict[str, Any]]


def _csv(rows: Rows, separator: str) -> bytes:
    lines = [separator.join(rows[0])] + [separator.join(str(value) for value in row.values()) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=2)
    return bytes(sink.getvalue())


def _arrow(rows: Rows, open_writer: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows))
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


CONTENTS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(list(rows), indent=1).encode(),
    "data.json": lambda rows: json.dumps({"version": "1", "data": list(rows), "more": [1]}).encode(),
    "csv": lambda rows: _csv(rows, ","),
    "tsv": lambda rows: _csv(rows, "\t"),
    "parquet": _parquet,
    "arrow": lambda rows: _arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: _arrow(rows, pa.ipc.new_stream),
    "txt": lambda rows: "".join(f"{row['text']}\n" for row in rows).encode(),
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Rows], Path]:
    """Write rows under a name whose suffixes give format and compression."""

    def write(name: str, rows: Rows) -> Path:
        path = tmp_path / name
        _, _, kind = name.partition(".")
        compression = next(suffix for suffix in (".gz", ".zst", "") if kind.endswith(suffix))
        path.write_bytes(COMPRESSORS[compression](CONTENTS[kind.removesuffix(compression)](rows)))
        return path

    return write


@pytest.fixture
def source_of() -> Callable[..., SourceFile]:
    """The one source file that a path names."""

    def find(path: Path, format: Any = None) -> SourceFile:
        (source,) = find_sources([str(path)], format, "data.train")
        return source

    return find


@pytest.fixture
def make_job(tmp_path: Path, tiny_tokenizer: Path) -> Callable[..., Job]:
    """A classify job on the tiny tokenizer, unless told otherwise; keys other than task and model go into `data`."""

    def make(task: str = "classify", model: Path = tiny_tokenizer, **data: Any) -> Job:
        return parse_job(
            {
                "name": "test",
                "task": task,
                "model": {"path": str(model)},
                "data": {
                    name: [str(v) for v in value] if name in ("train", "eval") else value
                    for name, value in data.items()
                },
                "train": {"global_batch_size": 2, "epochs": 1, "learning_rate": 1e-4},
                "storage": str(tmp_path / "storage"),
            }
        )

    return make


@pytest.fixture
def shard_here() -> Callable[..., Shards]:
    """The data stage in this process, unit by unit."""
    return shard_locally
