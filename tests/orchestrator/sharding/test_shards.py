"""The data stage as a whole: the same bytes at any number of workers and after a kill, nothing done twice, and bad
input refused with its exit code.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sharding import stage
from orchestrator.sharding.stage import ShardProgress, write_shards
from tests.tiny import checked, load_written
from trainers.errors import DataError, JobError, TuneyardError
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.shards.keys import plan_splits
from trainers.shards.manifest import MANIFEST, shards_folder
from trainers.storage import Folder

LABELS = ("good", "bad")
DRIVER = """
import json, sys
from tests.ray_head import init_ray
from tests.tiny import checked
from orchestrator.sharding import stage
from orchestrator.sharding.stage import write_shards
from trainers.job.load import parse_job
stage.SMALL_BYTES = -1
init_ray(num_cpus=1, object_store_memory=200 * 2**20)
job = parse_job(json.loads(sys.argv[1]))
write_shards(checked(job))
"""


def plain_job(tmp_path: Path, model: Path, storage: str = "storage", **data: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "task": "classify",
        "model": {"path": str(model)},
        "data": data,
        "train": {"global_batch_size": 2, "epochs": 1, "learning_rate": 1e-4},
        "storage": str(tmp_path / storage),
    }


def make_job(tmp_path: Path, model: Path, storage: str = "storage", **data: Any) -> Job:
    return parse_job(plain_job(tmp_path, model, storage, **data))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Twelve files, so twelve units, with a malformed row in each."""
    for number in range(12):
        rows = [{"text": f"a {LABELS[i % 2]} film {number} {i}", "label": LABELS[i % 2]} for i in range(40)]
        (tmp_path / f"{number:02d}.jsonl").write_text("torn\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "*.jsonl")]


def content(job: Job) -> dict[str, bytes]:
    """Every file of every split."""
    root = Path(job.storage) / "shards"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stamps(job: Job) -> dict[str, int | bytes]:
    """When each file was written; of a manifest, whose time tells its last use, what it says.

    Staged files are left out: a worker may give them their names meanwhile.
    """
    files = [path for path in Path(job.storage).rglob("*.*") if not path.name.startswith(".tmp-")]
    return {str(path): path.read_bytes() if path.name == MANIFEST else path.stat().st_mtime_ns for path in files}


@pytest.mark.usefixtures("ray_session")
def test_every_row_of_every_file_ends_up_in_the_shards(tmp_path: Path, files: list[str], tiny_tokenizer: Path) -> None:
    job = make_job(tmp_path, tiny_tokenizer, train=files, eval=[str(tmp_path / "00.jsonl")], max_drop_fraction=0.1)
    seen: list[ShardProgress] = []
    shards = write_shards(checked(job, tiny_tokenizer), seen.append)
    assert len(shards.train.shards) == 12 and len(shards.eval.shards) == 1
    assert shards.train.outcomes == {"kept": 480, "dropped:malformed": 12} and shards.train.rows_in == 492
    assert shards.train.labels == {"bad": 240, "good": 240}
    assert [(one.split, one.units_done, one.units_total) for one in seen] == [
        *(("train", done, 12) for done in range(1, 13)), ("eval", 1, 1)
    ]  # fmt: skip
    assert (seen[11].rows, seen[11].tokens) == (480, shards.train.total("tokens"))
    assert load_written(job, tiny_tokenizer) == shards


@pytest.mark.usefixtures("ray_session")
def test_a_second_run_writes_nothing_and_starts_no_task(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, tiny_tokenizer, train=files, eval_fraction=0.2, max_drop_fraction=0.1)
    first, before = write_shards(checked(job, tiny_tokenizer)), stamps(job)
    assert first.train.rows_in + first.eval.rows_in == 492

    def no_task(*_: Any) -> Any:
        raise AssertionError("a committed split was read again")

    monkeypatch.setattr(stage, "map_units", no_task)
    assert write_shards(checked(job, tiny_tokenizer)) == first
    assert stamps(job) == before


@pytest.mark.usefixtures("ray_session")
def test_after_a_kill_only_the_shards_in_flight_are_written_again(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path
) -> None:
    job = make_job(tmp_path, tiny_tokenizer, train=files, eval=files, max_drop_fraction=0.1)
    shards, whole, before = write_shards(checked(job, tiny_tokenizer)), content(job), stamps(job)
    folder = shards_folder(Folder(job.storage), shards.train.key)
    for name in ("manifest.json", "shard-00003.json", "shard-00007.json", "shard-00007.arrow"):
        folder.delete(name)
    stale, young = folder.path / ".tmp-1-shard-00003.arrow", folder.path / ".tmp-2-shard-00007.arrow"
    for path in (stale, young):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))
    seen: list[ShardProgress] = []
    assert write_shards(checked(job, tiny_tokenizer), seen.append) == shards
    assert [one.units_done for one in seen] == [11, 12]
    assert not stale.exists() and young.exists()  # the young one could be another run's
    young.unlink()
    assert content(job) == whole
    again = {Path(path).name for path, stamp in stamps(job).items() if before.get(path) != stamp}
    assert again >= {"shard-00003.arrow", "shard-00007.arrow"}
    assert not again & {"shard-00002.arrow", "shard-00002.json", "ledger-00011.arrow"}


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_a_driver_killed_at_one_worker_is_finished_at_two_with_the_same_bytes(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path
) -> None:
    data = {"train": files, "eval": files, "max_drop_fraction": 0.1}
    plain = plain_job(tmp_path, tiny_tokenizer, "killed", **data)
    job = parse_job(plain)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(plain)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 400
        while not list(Path(job.storage).glob("shards/*/shard-00001.json")):
            assert driver.poll() is None and time.monotonic() < deadline, "the driver wrote no shard"
            time.sleep(0.01)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    written = {path: stamp for path, stamp in stamps(job).items() if path.endswith(".json")}
    assert not list(Path(job.storage).rglob("manifest.json")) or len(written) < 28
    write_shards(checked(job, tiny_tokenizer))
    clean = make_job(tmp_path, tiny_tokenizer, "clean", **data)
    write_shards(checked(clean, tiny_tokenizer))
    finished = {name: data for name, data in content(job).items() if "/.tmp-" not in name}
    assert finished == content(clean)
    committed = {path: stamp for path, stamp in written.items() if "shard-" in path}
    assert committed and {path: Path(path).stat().st_mtime_ns for path in committed} == committed  # not one is redone


WORKERS = """
import json, sys, ray
from tests.ray_head import init_ray
from tests.tiny import checked
from orchestrator.sharding import stage
from orchestrator.sharding.stage import write_shards
from trainers.job.load import parse_job
stage.SMALL_BYTES = -1
for cpus, plain in json.loads(sys.argv[1]):
    init_ray(num_cpus=cpus, object_store_memory=200 * 2**20)
    job = parse_job(plain)
    write_shards(checked(job))
    ray.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_shards_are_the_same_bytes_at_one_two_and_four_workers(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path
) -> None:
    data = {"train": files, "eval": files, "max_drop_fraction": 0.1}
    runs = [(cpus, plain_job(tmp_path, tiny_tokenizer, f"by-{cpus}", **data)) for cpus in (1, 4)]
    subprocess.run([sys.executable, "-c", WORKERS, json.dumps(runs)], check=True, stderr=subprocess.DEVNULL)
    job = make_job(tmp_path, tiny_tokenizer, "by-2", **data)
    write_shards(checked(job, tiny_tokenizer))
    by_two = content(job)
    assert len(by_two) > 24
    for _, plain in runs:
        assert content(parse_job(plain)) == by_two


@pytest.mark.usefixtures("ray_session")
def test_a_changed_source_does_its_own_shards_again_and_no_others(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator.sharding.stage")
    data = {"train": files, "eval": [str(tmp_path / "05.jsonl")], "max_drop_fraction": 0.1}
    job = make_job(tmp_path, tiny_tokenizer, **data)
    first = write_shards(checked(job, tiny_tokenizer))
    with (tmp_path / "03.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "a new film", "label": "good"}) + "\n")
    os.utime(tmp_path / "04.jsonl")  # touched, but not changed
    shards_folder(Folder(job.storage), first.train.key).write_bytes("shard-00006.arrow", b"short")
    before = stamps(job)
    seen: list[ShardProgress] = []
    second = write_shards(checked(job, tiny_tokenizer), seen.append)
    assert [one.units_done for one in seen] == [11, 12] and second.eval == first.eval
    assert f"the train shards {first.train.key} do not fit any more: sources changed" in caplog.text
    assert "10 of 12 train shards taken over" in caplog.text
    assert second.train.rows_in == first.train.rows_in + 1
    assert {path: stamp for path, stamp in stamps(job).items() if path in before} == before
    clean = make_job(tmp_path, tiny_tokenizer, "clean", **data)
    write_shards(checked(clean, tiny_tokenizer))
    key = plan_splits(job, str(tiny_tokenizer))[0].key
    again, whole = content(job), content(clean)
    assert {name: again[name] for name in whole} == whole and any(name.startswith(key) for name in whole)


@pytest.mark.usefixtures("ray_session")
def test_a_budget_is_checked_again_over_committed_shards(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path
) -> None:
    strict = make_job(tmp_path, tiny_tokenizer, train=files, eval=files)
    for _ in range(2):
        with pytest.raises(DataError, match=r"12 of 492 rows are dropped"):
            write_shards(checked(strict, tiny_tokenizer))
    before = stamps(strict)
    lenient = make_job(tmp_path, tiny_tokenizer, train=files, eval=files, max_drop_fraction=0.03)
    write_shards(checked(lenient, tiny_tokenizer))
    assert stamps(lenient) == before


@pytest.mark.usefixtures("ray_session")
def test_a_miss_is_explained_in_the_log(
    tmp_path: Path, files: list[str], tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator.sharding.stage")
    data = {"train": [files[0].replace("*", "00")], "eval": [files[0].replace("*", "01")], "max_drop_fraction": 0.1}
    write_shards(checked(make_job(tmp_path, tiny_tokenizer, **data), tiny_tokenizer))
    assert "do not fit" not in caplog.text and "sharded 41 train rows into 1 files" in caplog.text
    write_shards(checked(make_job(tmp_path, tiny_tokenizer, **data, max_length=64), tiny_tokenizer))
    assert "do not fit any more: length changed" in caplog.text


BAD_INPUT: dict[str, tuple[str, bytes, dict[str, Any], int, str]] = {
    "missing file": ("x.jsonl", b"", {"train": ["y.jsonl"]}, 2, "did you mean"),
    "unknown format": ("x.data", b"x", {}, 2, "Set data.format"),
    "missing column": ("x.jsonl", b'{"review": "a", "label": "good"}\n', {}, 2, "no column 'text'"),
    "not as named": ("x.parquet", b'{"text": "a"}\n', {}, 4, "expected a Parquet file"),
    "empty": ("x.jsonl", b"\n\n", {}, 4, "the data set is empty"),
    "no file content": ("x.csv", b"", {}, 4, "the data set is empty"),
    "over budget": ("x.jsonl", b'{"text": "a", "label": "good"}\ntorn\n', {}, 4, "1 of 2 rows are dropped"),
    "torn late": ("x.json", b"[" + b'{"text": "a", "label": "good"},' * 500, {}, 4, "expected a JSON list"),
}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_its_exit_code_and_one_message(case: str, tmp_path: Path, tiny_tokenizer: Path) -> None:
    name, data, change, code, says = BAD_INPUT[case]
    (tmp_path / name).write_bytes(data)
    patterns = {"train": [name], "eval": [name]} | change
    job = make_job(tmp_path, tiny_tokenizer, **{key: [str(tmp_path / one) for one in v] for key, v in patterns.items()})
    with pytest.raises(TuneyardError) as caught:
        write_shards(checked(job, tiny_tokenizer))
    assert caught.value.exit_code == code and says in str(caught.value)
    assert type(caught.value) in (JobError, DataError)


def test_columns_missing_in_both_splits_are_told_at_once(tmp_path: Path, tiny_tokenizer: Path) -> None:
    for name in ("t", "e"):
        (tmp_path / f"{name}.jsonl").write_text('{"review": "a", "label": "good"}\n')
    train, other = [str(tmp_path / "t.jsonl")], [str(tmp_path / "e.jsonl")]
    with pytest.raises(JobError, match=r"(?s)data\.train: .*t\.jsonl: no column.*data\.eval: .*e\.jsonl: no column"):
        write_shards(checked(make_job(tmp_path, tiny_tokenizer, train=train, eval=other), tiny_tokenizer))
    with pytest.raises(JobError) as caught:
        write_shards(checked(make_job(tmp_path, tiny_tokenizer, train=train, eval_fraction=0.5), tiny_tokenizer))
    assert len(caught.value.problems) == 1


@pytest.mark.usefixtures("ray_session")
def test_a_label_that_training_never_saw_is_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    for name, labels in (("t", ("good", "bad")), ("e", ("good", "other"))):
        rows = [json.dumps({"text": "a film", "label": label}) + "\n" for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    job = make_job(tmp_path, tiny_tokenizer, train=[str(tmp_path / "t.jsonl")], eval=[str(tmp_path / "e.jsonl")])
    with pytest.raises(DataError, match="'other'"):
        write_shards(checked(job, tiny_tokenizer))


@pytest.mark.usefixtures("ray_session")
def test_a_refused_job_leaves_committed_shards_alone(tmp_path: Path, files: list[str], tiny_tokenizer: Path) -> None:
    good = make_job(tmp_path, tiny_tokenizer, train=files, eval=files, max_drop_fraction=0.1)
    write_shards(checked(good, tiny_tokenizer))
    before = stamps(good)
    (tmp_path / "x.json").write_bytes(BAD_INPUT["torn late"][1])
    bad = make_job(tmp_path, tiny_tokenizer, train=files, eval=[str(tmp_path / "x.json")], max_drop_fraction=0.1)
    with pytest.raises(DataError):
        write_shards(checked(bad, tiny_tokenizer))
    after = stamps(good)
    assert {path: after[path] for path in before} == before
