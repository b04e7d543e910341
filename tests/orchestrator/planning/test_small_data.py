"""Small data is counted before it is sharded: the plan says the same before and after."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import small_data
from orchestrator.planning.plan import plan_job
from tests.tiny import chat_rows, checked, film_rows, make_bert, make_llama, shard_locally, tiny_job
from trainers.errors import DataError

COUNTS = ("exact", "train_rows", "train_tokens", "sequences", "steps")


def counts(job: Any) -> dict[str, Any]:
    plan = plan_job(checked(job)).model_dump()
    return {name: plan[name] for name in COUNTS}


@pytest.mark.parametrize("kind", ["rows", "packed", "fraction"])
def test_the_plan_of_small_data_is_exact_before_the_shards_are_written(
    kind: str, tmp_path: Path, tiny_tokenizer: Path, tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*film_rows(57), {"text": "no label"}]
    job = tiny_job(
        tmp_path, make_bert(tmp_path / "m", tiny_tokenizer), "classify", rows, data={"max_drop_fraction": 0.5}
    )
    if kind == "packed":
        job = tiny_job(tmp_path, make_llama(tmp_path / "c", tiny_chat_tokenizer), "sft", chat_rows(40),
                       data={"max_length": 256})  # fmt: skip
    if kind == "fraction":
        data = job.data.model_copy(update={"eval": (), "eval_fraction": 0.3})
        job = job.model_copy(update={"data": data})
    job = job.model_copy(update={"train": job.train.model_copy(update={"steps": None, "epochs": 2.0})})
    before = counts(job)
    assert before["exact"]
    shard_locally(job)
    assert counts(job) == before and json.dumps(before)
    monkeypatch.setattr(small_data, "MOST_BYTES", 10)
    assert small_data.count_small(checked(job)) is None


def test_rows_that_would_be_refused_later_are_refused_by_the_plan(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "m", tiny_chat_tokenizer)
    liked = [{**row, "label": bool(index % 2)} for index, row in enumerate(chat_rows(4))]
    with pytest.raises(DataError, match=r"4 of 12 rows cannot be used: preference_labels: label says .* \(4\)"):
        small_data.count_small(checked(tiny_job(tmp_path, model, "sft", [*chat_rows(10), *liked])))
    allowed = tiny_job(tmp_path, model, "sft", [*chat_rows(10), *liked], data={"max_drop_fraction": 0.5})
    counted = small_data.count_small(checked(allowed))
    assert counted and counted[0] == 8
    only = tiny_job(tmp_path, model, "sft", liked, data={"max_drop_fraction": 1.0})
    with pytest.raises(DataError, match="3 of 3 rows"):
        small_data.count_small(checked(only))


def test_one_class_alone_is_refused_by_the_plan(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = [{**row, "label": "a"} for row in film_rows(9)]
    job = tiny_job(tmp_path, make_bert(tmp_path / "m", tiny_tokenizer), "classify", rows)
    with pytest.raises(DataError, match="nothing to tell apart"):
        small_data.count_small(checked(job))
