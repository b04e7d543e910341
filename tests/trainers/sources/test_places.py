"""Data and shards in a bucket, spoken to by the S3 and the Google protocol on loopback; places that cannot be reached;
and data sets of the `datasets` library.
"""

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.bucket import serve_bucket
from tests.ray_head import answers
from tests.tiny import checked
from trainers import storage
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import plan_splits
from trainers.shards.manifest import read_manifest, shards_folder
from trainers.sources.files import find_sources
from trainers.sources.readers import plan_units, read_unit
from trainers.storage import Folder
from trainers.tasks import load_task

ROWS = [{"text": f"a good film {index}", "label": ("good", "bad")[index % 2]} for index in range(200)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A function from a key to its URI, in a bucket that a server on loopback keeps."""
    with serve_bucket() as yard:
        yield yard.uri


def put(uri: str, data: bytes) -> None:
    folder, _, name = uri.partition("?")[0].rpartition("/")
    Folder(f"{folder}?{uri.partition('?')[2]}").write_bytes(name, data)


def plain_job(model: Path, storage: str, **data: Any) -> dict[str, Any]:
    train = {"global_batch_size": 2, "epochs": 1, "learning_rate": 1e-4}
    return {"name": "t", "task": "classify", "model": {"path": str(model)}, "data": data, "train": train,
            "storage": storage}  # fmt: skip


def test_globs_and_folders_of_a_bucket_keep_their_options(bucket: Any) -> None:
    for name in ("one/a.jsonl", "one/b.jsonl.gz", "one/deep/c.jsonl"):
        put(bucket(name), gzip.compress(lines(ROWS)) if name.endswith("gz") else lines(ROWS))
    found = find_sources([bucket("one/*.jsonl"), bucket("one/*.gz")], None, "x")
    assert [len(list(read_unit(unit, found[unit.file], {"text": "text"}))) for unit in plan_units(found)] == [200, 200]
    assert [one.uri for one in found] == [bucket("one/a.jsonl"), bucket("one/b.jsonl.gz")]
    assert len(find_sources([bucket("one/**/*.jsonl")], None, "x")) == 2
    assert len(find_sources([bucket("one")], "jsonl", "x")) == 3
    with pytest.raises(JobError, match="no such file"):
        find_sources([bucket("one/z.jsonl")], None, "x")


@pytest.mark.usefixtures("ray_session")
def test_shards_are_written_to_a_bucket_and_read_from_a_local_copy(
    bucket: Any, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.sharding.stage import write_shards

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    put(bucket("data/t.jsonl"), lines(ROWS))
    put(bucket("data/e.jsonl"), lines(ROWS[:3]))
    plain = plain_job(tiny_tokenizer, bucket("storage"), train=[bucket("data/t.jsonl")], eval=[bucket("data/e.jsonl")])
    job = parse_job(plain)
    shards = write_shards(checked(job, tiny_tokenizer))
    assert write_shards(checked(job, tiny_tokenizer)) == shards
    folder = shards_folder(Folder(job.storage), shards.train.key)
    assert read_manifest(folder) == shards.train and "manifest.json" in folder.list()
    held = ShardSet(folder, shards.train, load_task("classify"))
    assert len(held) == 200 and held.origin(199)[0] == job.data.train_paths[0]
    assert held.row(7).input_ids.tolist() == held.row(7).input_ids.tolist() and held.lengths.sum() > 0
    copies = list(tmp_path.rglob("shard-*.arrow"))
    assert [copy.stat().st_size for copy in copies] == [shards.train.shards[0].bytes]
    local = parse_job({**plain, "storage": str(tmp_path / "local")})
    assert write_shards(checked(local, tiny_tokenizer)).train.shards == shards.train.shards


GS_SERVER = """
import http.server, sys, time
from gcp_storage_emulator import server
server.server.HTTPServer = http.server.ThreadingHTTPServer  # pyarrow holds several connections open
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="yard").run()
"""


@pytest.fixture(scope="module")
def gs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function from a key to its URI, in a bucket of the Google protocol on loopback."""
    from orchestrator.training.node_report import free_port

    port = free_port()
    log = (tmp_path_factory.mktemp("gs") / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-c", GS_SERVER, str(port)], stdout=log, stderr=log)
    deadline = time.monotonic() + 400
    while not answers(f"http://127.0.0.1:{port}/"):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield lambda key: f"gs://anonymous@yard/{key}?endpoint_override=127.0.0.1:{port}&scheme=http"
    server.kill()
    server.wait()


@pytest.mark.usefixtures("ray_session")
def test_data_and_shards_may_lie_in_a_bucket_of_google(gs_bucket: Any, tiny_tokenizer: Path, tmp_path: Path) -> None:
    from orchestrator.sharding.stage import write_shards

    put(gs_bucket("data/t.jsonl"), lines(ROWS))
    put(gs_bucket("data/e.jsonl.gz"), gzip.compress(lines(ROWS[:3])))
    assert [one.uri for one in find_sources([gs_bucket("data/*.jsonl")], None, "x")] == [gs_bucket("data/t.jsonl")]
    data = {"train": [gs_bucket("data/t.jsonl")], "eval": [gs_bucket("data/e.jsonl.gz")]}
    shards = write_shards(checked(parse_job(plain_job(tiny_tokenizer, gs_bucket("storage"), **data)), tiny_tokenizer))
    assert shards.train.outcomes == {"kept": 200} and shards.eval.outcomes == {"kept": 3}
    held = ShardSet(shards_folder(Folder(gs_bucket("storage")), shards.train.key), shards.train, load_task("classify"))
    assert held.origin(199)[0] == gs_bucket("data/t.jsonl") and len(held.row(7).input_ids) == held.lengths[7]
    local = parse_job(plain_job(tiny_tokenizer, str(tmp_path), **data))
    assert write_shards(checked(local, tiny_tokenizer)).train.shards == shards.train.shards


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (
            "gs://anonymous@yard/a.jsonl?endpoint_override=127.0.0.1:1&scheme=http",
            "cannot be read",
        ),
        ("s3://a:b@yard/a.jsonl?endpoint_override=127.0.0.1:1&scheme=http&region=x", "cannot be read"),
        ("hdfs://nowhere:1/a.jsonl", "cannot use 'hdfs://nowhere:1/a.jsonl'"),  # there is no libhdfs here
        ("ftp://nowhere/a.jsonl", "s3://, gs:// and hdfs:// are understood"),
    ],
)
def test_a_place_that_cannot_be_reached_is_told_before_anything_starts(
    uri: str, says: str, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.sharding import stage

    def no_task(*_: Any) -> Any:
        raise AssertionError("a task was started")

    monkeypatch.setattr(storage, "GS_RETRY_S", 1)
    for name in ("map_units", "map_tasks", "start_workers"):
        monkeypatch.setattr(stage, name, no_task)
    job = parse_job(plain_job(tiny_tokenizer, str(tmp_path), train=[uri], eval=[uri]))
    with pytest.raises(JobError, match=f"data.train: .*{re.escape(job.data.train_paths[0])}") as caught:
        stage.write_shards(checked(job, tiny_tokenizer))
    assert says in str(caught.value)


def test_a_bucket_that_cannot_be_reached_now_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its file system is made, pyarrow asks the network for the region; no address shows a key."""
    from trainers.errors import may_pass

    class Away:
        @staticmethod
        def from_uri(uri: str) -> Any:
            raise OSError(f"When resolving the region of {uri}: timeout")

    monkeypatch.setattr(storage.pafs, "FileSystem", Away)
    with pytest.raises(OSError, match="cannot use 's3://") as caught:
        Folder("s3://K:SECRETS@yard/x").list()
    assert may_pass(caught.value) and not isinstance(caught.value, JobError)
    assert "SECRETS" not in str(caught.value)


def test_a_data_set_of_the_hubs_library_is_read_offline(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    import datasets

    made = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in ("train", "test")})
    made.save_to_disk(tmp_path / "saved")
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(ROWS))
    for place in (tmp_path / "saved", folder):
        uri = f"hf://{place}:train"
        (source,) = find_sources([uri], None, "x")
        assert source.format == "arrow"
        job = make_job(train=[uri], eval=[folder / "train.jsonl"])
        assert shard_here(job).train.outcomes == {"kept": 200}


@pytest.mark.parametrize("uri", ["hf://squad", "hf:///nowhere:train", "hf://a/b:train[:10%]"])
def test_a_data_set_that_is_not_there_is_refused(uri: str) -> None:
    with pytest.raises(JobError, match=r"hf://DATASET"):
        find_sources([uri], None, "x")


def test_a_stream_of_record_batches_is_split_into_units(tmp_path: Path, source_of: Any) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    source = source_of(tmp_path / "x.arrow")
    units = plan_units([source], 2000)
    assert len(units) > 3
    found = [row for unit in units for row in read_unit(unit, source, {"text": "text", "label": "label"})]
    assert found == list(enumerate(ROWS))


def test_the_key_is_the_same_wherever_the_bytes_lie(bucket: Any, tmp_path: Path, tiny_tokenizer: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines(ROWS))
    put(bucket("data/t.jsonl"), lines(ROWS))
    jobs = [plain_job(tiny_tokenizer, str(tmp_path), train=[uri], eval=[uri])
            for uri in (str(tmp_path / "t.jsonl"), bucket("data/t.jsonl"))]  # fmt: skip
    here, there = (plan_splits(parse_job(one), str(tiny_tokenizer)) for one in jobs)
    assert [plan.key for plan in here] == [plan.key for plan in there]
