"""A row's place is told as an editor counts, or as the ledger does where the file cannot be read so."""

from pathlib import Path

import pytest

from trainers.sources.place import place_of


def test_a_line_of_a_file_that_is_there_has_its_number(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [place_of(str(rows), at) for at in (0, 10)] == ["rows.jsonl:1", "rows.jsonl:3"]
    named = tmp_path / "rows.data"
    named.write_bytes(rows.read_bytes())
    assert place_of(str(named), 10, "jsonl") == "rows.data:3"


@pytest.mark.parametrize(
    "uri, said",
    [
        ("/gone/rows.jsonl", "rows.jsonl, byte 10"),
        ("s3://bucket/rows.jsonl", "rows.jsonl, byte 10"),
        ("/gone/rows.parquet", "rows.parquet, row 10 from 0"),
        ("/gone/rows.csv", "rows.csv, row 10 from 0"),
    ],
)
def test_elsewhere_it_is_what_the_ledger_says(uri: str, said: str) -> None:
    assert place_of(uri, 10) == said
