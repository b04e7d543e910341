"""hdfs:// against a real name node, where there is one.

TUNEYARD_HDFS=hdfs://HOST:PORT/FOLDER pytest tests/trainers/sources/test_hdfs.py, with libhdfs, a JVM and a CLASSPATH as
pyarrow's documentation asks for. Everything below FOLDER is removed.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sharding.stage import write_shards
from tests.tiny import checked
from trainers.job.load import parse_job
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.sources.files import find_sources
from trainers.storage import Folder
from trainers.tasks import load_task

PLACE = os.environ.get("TUNEYARD_HDFS", "")
pytestmark = [
    pytest.mark.skipif(not PLACE, reason="TUNEYARD_HDFS names no folder of an HDFS; libhdfs and a JVM are needed too"),
    pytest.mark.usefixtures("ray_session"),
]
ROWS = [{"text": f"a good film {index}", "label": "good"} for index in range(500)]


@pytest.fixture
def place() -> Folder:
    """An empty folder."""
    Folder(PLACE).delete()
    return Folder(PLACE)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_files_appear_whole_and_are_found_by_globs(place: Folder) -> None:
    (place / "one").write_bytes("a.jsonl", lines(ROWS))
    (place / "one").write_bytes("b.jsonl.gz", gzip.compress(lines(ROWS)))
    (place / "one").write_bytes("a.jsonl", lines(ROWS[:9]))
    staged = (place / "one").stage_output("c.jsonl")
    staged.stream.write(lines(ROWS))
    assert (place / "one").list() == ["a.jsonl", "b.jsonl.gz"], "what is being written is not there yet"
    staged.discard()
    assert [one.size for one in find_sources([f"{place}/one/*.jsonl"], None, "x")] == [len(lines(ROWS[:9]))]
    assert len(find_sources([f"{place}/one"], "jsonl", "x")) == 2
    assert (place / "none").list() == []
    with pytest.raises(FileNotFoundError):
        place.read_bytes("none")


def test_shards_are_those_of_the_local_file_system(place: Folder, tmp_path: Path, tiny_tokenizer: Path) -> None:
    local = Folder(str(tmp_path))
    found = []
    for where in (place, local):
        (where / "data").write_bytes("t.jsonl", lines(ROWS))
        (where / "data").write_bytes("e.jsonl.gz", gzip.compress(lines(ROWS[:3]), mtime=0))
        data = {"train": [f"{where}/data/t.jsonl"], "eval": [f"{where}/data/e.jsonl.gz"]}
        job = parse_job({
            "name": "hdfs", "task": "classify", "model": {"path": str(tiny_tokenizer)}, "data": data,
            "train": {"global_batch_size": 2, "epochs": 1, "learning_rate": 1e-4}, "storage": f"{where}/storage",
        })  # fmt: skip
        shards = write_shards(checked(job, tiny_tokenizer))
        folder = shards_folder(Folder(job.storage), shards.train.key)
        held = ShardSet(folder, shards.train, load_task("classify"))
        assert held.row(499).input_ids.tolist() and held.origin(499)[0] == data["train"][0]
        found.append((shards.train.key, [folder.read_bytes(record.file) for record in shards.train.shards]))
    assert found[0] == found[1]
