"""The key changes with what the shards hold and with nothing else, and a miss says what changed."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from tests.tiny import load_written
from trainers.errors import DataError, JobError
from trainers.shards.keys import plan_splits
from trainers.shards.manifest import other_manifests, shards_folder
from trainers.shards.reuse import explain_miss
from trainers.storage import Folder

ROWS = [{"text": "a good film", "label": "good"}, {"text": "a bad film", "label": "bad"}] * 5


def shard_keys(job: Any, model: str) -> list[str]:
    return [plan.key for plan in plan_splits(job, model)]


@pytest.fixture
def data(write_rows: Any) -> Path:
    path: Path = write_rows("x.jsonl", ROWS)
    return path


def test_splits_never_share_a_key(make_job: Any, data: Path, tiny_tokenizer: Path) -> None:
    keys = {
        *shard_keys(make_job(train=[data], eval=[data]), str(tiny_tokenizer)),
        *shard_keys(make_job(train=[data], eval_fraction=0.2), str(tiny_tokenizer)),
        *shard_keys(make_job(train=[data], eval_fraction=0.3), str(tiny_tokenizer)),
    }
    assert len(keys) == 6 and all(len(key) == 16 for key in keys)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_length": 99}, "length"),
        ({"overlong": "drop"}, "length"),
        ({"columns": {"text": "label"}}, "columns"),
        ({"format": "text"}, "sources"),
        ({"packing": False, "max_drop_fraction": 0.5}, None),
    ],
)
def test_the_key_follows_what_the_shards_hold(
    make_job: Any, data: Path, tiny_tokenizer: Path, change: dict[str, Any], part: str | None
) -> None:
    before, _ = plan_splits(make_job(train=[data], eval=[data]), str(tiny_tokenizer))
    after, _ = plan_splits(make_job(train=[data], eval=[data], **change), str(tiny_tokenizer))
    changed = [name for name in before.key_parts if before.key_parts[name] != after.key_parts[name]]
    assert changed == ([part] if part else []) and (before.key == after.key) == (part is None)


def test_a_moved_file_keeps_the_key_and_a_changed_tokenizer_does_not(
    make_job: Any, data: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    before = shard_keys(make_job(train=[data], eval=[data]), str(tiny_tokenizer))
    moved = data.rename(tmp_path / "y.jsonl")
    assert shard_keys(make_job(train=[moved], eval=[moved]), str(tiny_tokenizer)) == before
    model = copytree(tiny_tokenizer, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert shard_keys(make_job(train=[moved], eval=[moved]), str(model)) != before


def test_missing_files_of_both_splits_are_told_at_once(make_job: Any, tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = make_job(train=[tmp_path / "no.jsonl"], eval=[tmp_path / "none.jsonl"])
    with pytest.raises(JobError, match=r"(?s)data\.train.*no\.jsonl.*data\.eval.*none\.jsonl"):
        plan_splits(job, str(tiny_tokenizer))


def test_a_folder_without_a_tokenizer_is_refused(make_job: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no tokenizer"):
        shard_keys(make_job(train=[data], eval=[data]), str(tmp_path))


def test_a_miss_names_the_parts_that_changed(make_job: Any, data: Path, tiny_tokenizer: Path, shard_here: Any) -> None:
    job = make_job(train=[data], eval=[data])
    storage = Folder(job.storage)
    train, _ = plan_splits(job, job.model.path)
    assert explain_miss(train, dict(other_manifests(storage, train.key))) is None
    shard_here(job)
    with data.open("a") as stream:
        stream.write(json.dumps(ROWS[0]) + "\n")
    other, _ = plan_splits(make_job(train=[data], eval=[data], max_length=64), job.model.path)
    others = dict(other_manifests(storage, other.key))
    assert (
        explain_miss(other, others) == f"the train shards {train.key} do not fit any more: sources and length changed"
    )
    assert explain_miss(train, dict(other_manifests(storage, train.key))) is None


def test_shards_of_an_earlier_version_count_as_not_written(
    make_job: Any, data: Path, tiny_tokenizer: Path, shard_here: Any
) -> None:
    job = make_job(train=[data], eval=[data])
    folder = shards_folder(Folder(job.storage), shard_here(job).train.key)
    earlier = {**folder.read_json("manifest.json"), "schema_version": 1, "shards": {"table": "shards.arrow"}}
    folder.write_json("manifest.json", earlier)
    assert load_written(job, tiny_tokenizer) is None
    folder.write_json("manifest.json", {**earlier, "schema_version": 2})
    with pytest.raises(DataError, match="damaged or of another version"):
        load_written(job, tiny_tokenizer)


def test_shards_are_found_without_ray_and_checked_by_the_job_that_asks(
    make_job: Any, data: Path, tiny_tokenizer: Path, shard_here: Any
) -> None:
    with data.open("a") as stream:
        stream.write("not json\n")
    job = make_job(train=[data], eval=[data], max_drop_fraction=0.2)
    assert load_written(job, tiny_tokenizer) is None
    written = shard_here(job)
    found = load_written(job, tiny_tokenizer)
    assert found == written and found.train.outcomes == {"kept": 10, "dropped:malformed": 1}
    with pytest.raises(DataError, match="max_drop_fraction"):
        load_written(make_job(train=[data], eval=[data]), tiny_tokenizer)
