"""Before anything is sharded, the content of each source is read once, whatever looks at the job."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.local import LocalFileSystem

from orchestrator.planning.plan import plan_job
from orchestrator.planning.preflight import check_job
from orchestrator.run_session import finished_run
from tests.tiny import film_rows, make_bert, tiny_job

HEAD = 2**20
"""What a look at the start of a file may read: names of columns, a sample of rows."""


class CountingFile:
    """A file that notes how much is read of it."""

    def __init__(self, file: Any, reads: list[int]) -> None:
        self._file, self._reads = file, reads
        reads.append(0)

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._reads[-1] += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class CountingFiles(LocalFileSystem):
    """Local files; bytes read by path, one number an opening."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, list[int]] = defaultdict(list)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return CountingFile(super().open(path, mode, **options), self.reads[str(path)])


@pytest.mark.parametrize("split", ["two files", "a fraction of one"])
def test_a_source_is_read_once_before_it_is_sharded(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    rows = [{**row, "text": row["text"] + " good" * 300} for row in film_rows(6000)]
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", rows)
    if split != "two files":
        data = job.data.model_copy(update={"eval": (), "eval_fraction": 0.1})
        job = job.model_copy(update={"data": data})
    files = CountingFiles()
    monkeypatch.setattr(pafs, "LocalFileSystem", lambda: pafs.PyFileSystem(pafs.FSSpecHandler(files)))
    checked = check_job(job)
    assert finished_run(checked) is None
    assert plan_job(checked).train_rows > 0
    sources = {path: reads for path, reads in files.reads.items() if path.endswith(".jsonl")}
    assert len(sources) == (2 if split == "two files" else 1)
    for path, reads in sources.items():
        size = Path(path).stat().st_size
        assert sorted(reads)[-1] == size > HEAD, reads
        assert len(reads) <= 5 and max(sorted(reads)[:-1]) <= HEAD, reads
