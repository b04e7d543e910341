"""Rows of classify written as arrays are what they are one by one."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.trainers.tasks.small import WORDS, word_tokenizer
from trainers.shards.files import shard_schema
from trainers.tasks import EncodeRules, Task, encode_rows, load_task
from trainers.tasks.base import Task as Base
from trainers.tasks.options import TaskOptions
from trainers.tokenizer.encoder import Encoder, read_spec
from trainers.tokenizer.token_arrays import EncodedBatch


def rows_of(several: bool, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(200):
        text = draw.choice([" ".join(draw.choices(WORDS, k=draw.randint(1, 14))), "", " ", None, 7])
        label: Any = draw.choice(["good", 3, True, None, 1.5])
        rows.append({"text": text, "label": [label, "x", label] if several and draw.random() < 0.9 else label})
    return rows


def table_of(batch: EncodedBatch, task: Task) -> list[Any]:
    extra = {name: batch.extra[name].to_pylist() for name in shard_schema(task).names if name in batch.extra}
    outcomes = [batch.outcomes[code] for code in batch.codes]
    ids = [batch.tokens[place].tolist() for place in range(len(batch.tokens))]
    return [ids, batch.row.tolist(), batch.part.tolist(), outcomes, batch.tokens_lost.tolist(), extra]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("causal", [False, True])
def test_arrays_are_the_rows_one_by_one(
    several: bool, overlong: Any, causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(read_spec(word_tokenizer(tmp_path / "model", causal)))
    task = load_task("classify", TaskOptions(multi_label=several))
    rules = EncodeRules(8, overlong, TaskOptions(multi_label=several))
    rows = rows_of(several, random.Random(1))
    quick = encode_rows(task, rows, encoder, rules)
    monkeypatch.setattr(encoder, "affixes", None)
    slow = encode_rows(task, rows, encoder, rules)
    assert table_of(quick, task) == table_of(slow, task)
    assert {"kept", "truncated" if overlong == "truncate" else "dropped:overlong"} <= set(table_of(quick, task)[3])
    held = pa.record_batch(
        [quick.extra[name] for name, _ in task.extra_schema], names=[n for n, _ in task.extra_schema]
    )
    counted = Base.count_labels(task, held)
    assert task.count_labels(held) == counted and len(counted) > 1
