"""A mixture shows of each part what its weight or budget says, the same each time, and the shards stay as they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.batching.mixture import Share, describe_mixture, draw_mixture
from trainers.batching.packing import index_packs
from trainers.errors import JobError
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder


def test_weights_and_budgets_are_kept_exactly() -> None:
    entries = np.repeat([0, 1, 2], [100, 50, 30])
    lengths = np.random.default_rng(0).integers(5, 20, 180).astype(np.int32)
    total = int(lengths[entries == 2].sum())
    shares = [Share(weight=2.5), Share(), Share(tokens=total + 77)]
    rows = draw_mixture(entries, lengths, shares, 3)
    counts = np.bincount(rows, minlength=180)
    assert counts[:100].sum() == 250 and set(counts[:100]) == {2, 3}
    assert set(counts[100:150]) == {1}
    taken = int(lengths[rows[entries[rows] == 2]].sum())
    assert total <= taken <= total + 77 < taken + 20
    assert np.array_equal(rows, draw_mixture(entries, lengths, shares, 3))
    assert not np.array_equal(rows, draw_mixture(entries, lengths, shares, 4))


def test_a_job_with_a_mixture_trains_on_it_and_evaluates_on_every_row_once(
    tmp_path: Path, make_job: Any, shard_here: Any, tiny_chat_tokenizer: Path
) -> None:
    for name, count in (("a", 40), ("b", 20)):
        lines = "".join(json.dumps({"text": f"the film {name} {i}"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    plain = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    data = {"eval": [plain[0]], "max_length": 64}
    mixed = [{"path": plain[0], "weight": 0.5}, {"path": plain[1], "weight": 3.0}]
    job = make_job("pretrain", tiny_chat_tokenizer, train=plain, **data)
    job = job.model_copy(update={"data": type(job.data)(**{**job.data.model_dump(), "train": mixed})})
    shards = shard_here(job, unit_bytes=200)
    assert set(shards.train.entries) == {0, 1}
    held = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, job_task(job, shards.train))
    packs = index_packs(job, held)
    assert len(packs.rows) == 20 + 60 and packs.sums(held.lengths).max() <= 64
    parts = describe_mixture(job, shards.train, held.lengths)
    assert [(part.rows, part.rows_drawn) for part in parts] == [(40, 20), (20, 60)]
    assert sum(part.tokens_drawn for part in parts) == packs.sums(held.lengths).sum()
    held_out = ShardSet(shards_folder(Folder(job.storage), shards.eval.key), shards.eval, held._task)
    assert sorted(index_packs(job, held_out).rows.tolist()) == list(range(40))


def test_a_part_with_both_a_weight_and_a_budget_is_refused(tmp_path: Path) -> None:
    from trainers.job.load import parse_job

    part = {"path": "a.jsonl", "weight": 1.0, "tokens": 5}
    train = {"global_batch_size": 2, "epochs": 1, "learning_rate": 1e-4}
    with pytest.raises(JobError, match="give one of them"):
        parse_job({"name": "x", "task": "pretrain", "model": {"path": "m"}, "train": train,
                   "data": {"train": [part], "eval": ["e.jsonl"]}})  # fmt: skip
