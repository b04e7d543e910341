"""What was written comes back: by place, with its origin, and with lengths and targets known without reading ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.shards import dataset
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import ShardManifest, shards_folder
from trainers.storage import Folder
from trainers.tasks import load_task
from trainers.tokenizer.encoder import load_encoder


def open_set(job: Job, manifest: ShardManifest) -> ShardSet:
    return ShardSet(shards_folder(Folder(job.storage), manifest.key), manifest, load_task(job.task))


@pytest.fixture
def chats(tmp_path: Path, make_job: Any, shard_here: Any, tiny_chat_tokenizer: Path) -> tuple[Job, ShardSet, Path]:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 5 + 1)}]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_job("sft", tiny_chat_tokenizer, train=[path], eval=[path], max_length=256)
    return job, open_set(job, shard_here(job, unit_bytes=1000).train), path


def test_rows_lengths_targets_and_origins_agree(chats: tuple[Job, ShardSet, Path]) -> None:
    job, shards, path = chats
    task, decode = load_task("sft"), load_encoder(job.model.path).tokenizer.decode
    assert len(shards.manifest.shards) > 3 and len(shards) == 60
    assert shards.lengths.dtype == np.int32 and shards.targets.dtype == np.int64
    assert shards.lengths.sum() == shards.manifest.total("tokens")
    assert shards.targets.sum() == shards.manifest.total("targets")
    content = path.read_bytes()
    for index in (0, 59, 17, 33, 16):
        row = shards.row(index)
        assert row.index == index and row.input_ids.dtype == np.int32
        assert len(row.input_ids) == shards.lengths[index]
        assert task.target_mask(row).sum() == shards.targets[index]  # type: ignore[attr-defined]
        uri, offset, part = shards.origin(index)
        source = json.loads(content[offset:].split(b"\n")[0])
        assert (uri, part) == (str(path), 0)
        assert f"say {index}<|im_end|>" in decode(row.input_ids) and source["messages"][0]["content"] == f"say {index}"


def test_ids_are_views_of_the_file_that_outlive_its_place_among_the_open(
    chats: tuple[Job, ShardSet, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "OPEN_SHARDS", 2)
    _, shards, _ = chats
    rows = [shards.row(index) for index in range(60)]
    assert len(shards._open) == 2
    assert not any(row.input_ids.flags.owndata or row.input_ids.flags.writeable for row in rows)
    assert [len(row.input_ids) for row in rows] == shards.lengths.tolist()
    assert all((row.input_ids == shards.row(row.index).input_ids).all() for row in rows)


def test_nothing_is_opened_before_it_is_needed(chats: tuple[Job, ShardSet, Path]) -> None:
    job, shards, _ = chats
    for shard in shards.manifest.shards[1:]:
        shards.folder.delete(shard.file)
    fresh = open_set(job, shards.manifest)
    assert len(fresh) == 60 and fresh.row(0).index == 0
    with pytest.raises(DataError, match=r"shard-000.*Remove .* to shard again"):
        fresh.row(59)


def test_places_outside_are_refused(chats: tuple[Job, ShardSet, Path]) -> None:
    for index in (-1, 60):
        with pytest.raises(IndexError):
            chats[1].row(index)


def test_a_file_that_is_not_the_committed_one_is_refused(chats: tuple[Job, ShardSet, Path]) -> None:
    job, shards, _ = chats
    first, second = shards.manifest.shards[:2]
    shards.folder.write_bytes(first.file, b"not arrow")
    with pytest.raises(DataError, match="damaged"):
        open_set(job, shards.manifest).row(0)
    wrong = shards.manifest.model_copy(update={"shards": (second.model_copy(update={"rows": second.rows + 1}),)})
    with pytest.raises(DataError, match="as committed"):
        open_set(job, wrong).row(0)


def test_lengths_come_from_the_shards_counts_and_are_put_together_once(chats: tuple[Job, ShardSet, Path]) -> None:
    job, shards, _ = chats
    lengths, targets = shards.lengths, shards.targets
    shards.folder.delete("counts-00001.npy")
    again = open_set(job, shards.manifest)
    assert (again.lengths == lengths).all() and (again.targets == targets).all()
    shards.folder.delete("counts.npy")
    with pytest.raises(DataError, match=r"counts-.*missing or damaged.*Remove .* to shard again"):
        _ = open_set(job, shards.manifest).lengths


def test_shards_without_rows_are_stepped_over(
    tmp_path: Path, make_job: Any, shard_here: Any, tiny_chat_tokenizer: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(f"{'a' * 500}\nshort\n")
    job = make_job("pretrain", tiny_chat_tokenizer, train=[path], eval=[path], max_length=600)
    shards = open_set(job, shard_here(job, unit_bytes=100).train)
    assert [shard.rows for shard in shards.manifest.shards] == [1, 0, 0, 0, 0, 1]
    assert shards.origin(1) == (str(path), 501, 0)
    assert len(shards.row(1).input_ids) == shards.lengths[1] == shards.targets[1] + 1
