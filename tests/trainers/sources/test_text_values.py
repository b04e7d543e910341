"""Lists and objects that flat files hold as text: as JSON, Python and numpy write them, and never as they are not."""

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.sources.readers import plan_units, read_unit
from trainers.sources.text_values import CutShort, read_messages, read_nested

WORDS = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(["it's", 'a "film"', "' '", "...", "array(", "]", "a b", "1 2"])),
    max_size=30,
)


def objects(values: list[Any]) -> Any:
    """An array as pandas has it for a column of lists."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


@given(words=WORDS)
def test_lists_are_read_back_however_they_were_written(words: list[str]) -> None:
    turns = [{"role": "user", "content": word} for word in words]
    answers = {"text": words, "answer_start": [*range(len(words))]}
    for text in (str(objects(words)), repr(words), json.dumps(words)):
        assert read_nested(text) == words
    for text in (str(objects(turns)), repr(turns), json.dumps(turns)):
        assert read_nested(text) == turns
    arrays = {"text": objects(words), "answer_start": np.arange(len(words), dtype=np.int32)}
    assert read_nested(str(arrays)) == answers
    pairs = np.array([["a", "b"], [words[0] if words else "", "c"]], object)
    assert read_nested(str(pairs)) == pairs.tolist()


@pytest.mark.parametrize(
    ("text", "value"), [("[0 3 0]", [0, 3, 0]), ("[ 1 -2]", [1, -2]), ("[ True False]", [True, False])]
)
def test_numbers_in_numpy_s_writing_are_read(text: str, value: list[Any]) -> None:
    assert read_nested(text) == value


@pytest.mark.parametrize(
    "text",
    ["['a' 'b', 'c']", "['a''b']", "['a' 'b'", "{'a' 'b'}", "[{'a': 1 'b': 2}]", "[B-per O]", "['a'] ['b']", "[a film"],
)
def test_what_can_be_read_in_two_ways_stays_text(text: str) -> None:
    assert read_nested(text) == text


@pytest.mark.parametrize(
    "text", [str(objects(["O"] * 1200)), "['a', ..., 'b']", "{'text': array(['a', ..., 'b'], dtype=object)}"]
)
def test_lists_that_numpy_cut_short_are_told(text: str) -> None:
    assert isinstance(read_nested(text), CutShort)


def test_tagged_words_that_pandas_wrote_keep_their_borders(make_job: Any, tmp_path: Path, shard_here: Any) -> None:
    rows = [(["ada", "was", "in", "paris"], ["B-per", "O", "O", "B-loc"]), (["the"] * 1001, ["O"] * 1001)]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", "tags"])
        writer.writerows([[str(objects(part)) for part in row] for row in rows])
    job = make_job("tag", train=[tmp_path / "x.csv"], eval=[tmp_path / "x.csv"], max_drop_fraction=1.0)
    train = shard_here(job).train
    assert train.outcomes == {"kept": 1, "dropped:list_cut_short_by_numpy": 1}
    assert train.labels == {"B-per": 1, "B-loc": 1, "O": 1}


def test_decimals_of_parquet_are_numbers(tmp_path: Path, source_of: Any) -> None:
    columns = {"score": [Decimal("4.50"), Decimal("3.00")], "label": [Decimal("1"), None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = source_of(tmp_path / "x.parquet")
    (unit,) = plan_units([source])
    found = [fields for _, fields in read_unit(unit, source, {"score": "score", "label": "label"})]
    assert found == [{"score": 4.5, "label": 1}, {"score": 3, "label": None}]
    assert not any(isinstance(value, Decimal) for fields in found if fields for value in fields.values())


@pytest.mark.parametrize("text", ["[1, 2]", "[Scene: ... ]", '[{"name": "a"}]', "{'role': 'user'}", "[]", "Hi"])
def test_what_somebody_says_stays_as_it_is(text: str) -> None:
    assert read_messages(text) == text


def test_prompts_of_messages_are_read_from_text() -> None:
    """As TRL has them, in a csv file."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for text in (str(objects(turns)), repr(turns), json.dumps(turns)):
        assert read_messages(text) == turns
