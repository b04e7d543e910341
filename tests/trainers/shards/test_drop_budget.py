"""Shards are refused for what they hold, with counts, examples and the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import DataError
from trainers.shards.drop_budget import check_shards


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD, BAD = {"text": "a good film", "label": "good"}, {"text": "a bad film", "label": "bad"}


def test_rows_over_budget_are_counted_and_ten_are_shown(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    train = jsonl(
        tmp_path / "t.jsonl", [GOOD, BAD] * 20 + [{"text": " ", "label": "good"}] * 9 + ['{"text": "torn'] * 4
    )
    other = jsonl(tmp_path / "e.jsonl", [GOOD, BAD, {"label": "good"}])
    job = make_job(train=[train], eval=[other])
    shards = shard_here(job, unit_bytes=700)
    with pytest.raises(DataError) as caught:
        check_shards(job, shards)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "data.train: 13 of 53 rows are dropped (24.53%), over data.max_drop_fraction (0.00%)" in message
    assert "set data.max_drop_fraction to at least 0.2453\n" in message
    assert "9  empty_text" in message and "4  malformed" in message
    assert "data.eval: 1 of 3 rows" in message and "missing_text" in message
    train_part = message.split("data.eval")[0]
    assert train_part.count(f"{train}, byte ") == 10
    first = sum(len(json.dumps(row)) + 1 for row in [GOOD, BAD] * 20)
    assert f'{train}, byte {first}: empty_text  {{"text": " ", "label": "good"}}' in message
    check_shards(make_job(train=[train], eval=[other], max_drop_fraction=0.34), shards)
    with pytest.raises(DataError, match=r"data\.eval"):
        check_shards(make_job(train=[train], eval=[other], max_drop_fraction=0.2454), shards)


def test_examples_survive_data_that_has_gone(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    train = jsonl(tmp_path / "t.jsonl", [GOOD, BAD, "torn"])
    job = make_job(train=[train], eval=[train])
    shards = shard_here(job)
    train.unlink()
    with pytest.raises(DataError, match=r"byte \d+: malformed"):
        check_shards(job, shards)


def test_overlong_rows_are_refused_where_the_job_says_error(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    train = jsonl(tmp_path / "t.jsonl", [GOOD, BAD, {"text": "film " * 20, "label": "good"}])
    job = make_job(train=[train], eval=[train], max_length=8, overlong="error", max_drop_fraction=1.0)
    with pytest.raises(DataError, match=r"1 of 3 rows are longer than data\.max_length \(8 tokens\)"):
        check_shards(job, shard_here(job))
    job = make_job(train=[train], eval=[train], max_length=8, overlong="drop", max_drop_fraction=0.5)
    check_shards(job, shard_here(job))


def test_an_empty_split_is_refused(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    train, empty = jsonl(tmp_path / "t.jsonl", [GOOD, BAD]), jsonl(tmp_path / "e.jsonl", ["", "  "])
    job = make_job(train=[train], eval=[empty])
    with pytest.raises(DataError, match=r"data\.eval: the data set is empty: no rows in .*e\.jsonl"):
        check_shards(job, shard_here(job))


def test_a_split_without_one_usable_row_is_refused_whatever_the_budget(
    tmp_path: Path, make_job: Any, shard_here: Any
) -> None:
    train, bad = jsonl(tmp_path / "t.jsonl", [GOOD, BAD]), jsonl(tmp_path / "e.jsonl", [{"text": "a"}] * 3)
    job = make_job(train=[train], eval=[bad], max_drop_fraction=1.0)
    with pytest.raises(DataError, match=r"(?s)data\.eval: not one of 3 rows can be used.*3  missing_label"):
        check_shards(job, shard_here(job))


def test_labels_that_training_never_saw_are_refused(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    train = jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, "label": "fine"}])
    job = make_job(train=[train], eval=[jsonl(tmp_path / "e.jsonl", [GOOD, BAD])])
    with pytest.raises(DataError, match=r"'bad' \(1 rows\)"):
        check_shards(job, shard_here(job))
