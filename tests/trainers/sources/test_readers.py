"""Every format gives the same rows, however it is compressed and cut; damage costs its own row and no other."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers.errors import DataError, JobError
from trainers.job.schema import TASK_FIELDS
from trainers.sources.files import SourceFile, find_sources
from trainers.sources.formats.base import Span
from trainers.sources.readers import Unit, check_columns, needed_fields, plan_units, read_unit

ROWS = [{"text": f"row {index} ünï", "label": "good" if index % 2 else "bad"} for index in range(7)]
COLUMNS = {"text": "text", "label": "label"}
LINE_FORMATS = ("jsonl", "json", "data.json", "csv", "tsv", "txt")
NAMES = [
    *(f"x.{kind}{suffix}" for kind in LINE_FORMATS for suffix in ("", ".gz", ".zst")),
    "x.parquet",
    "x.arrow",
    "x.stream.arrow",
]


def read_all(source: SourceFile, unit_bytes: int, columns: dict[str, str] = COLUMNS) -> list[Any]:
    units = plan_units([source], unit_bytes)
    assert [unit.index for unit in units] == list(range(len(units)))
    return [row for unit in units for row in read_unit(unit, source, columns)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit_bytes", [1, 50, 2**24])
def test_every_format_gives_the_rows_that_were_written(
    name: str, unit_bytes: int, write_rows: Any, source_of: Any
) -> None:
    source = source_of(write_rows(name, ROWS))
    found = read_all(source, unit_bytes)
    expected = [{"text": row["text"]} for row in ROWS] if source.format == "text" else ROWS
    assert [fields for _, fields in found] == expected
    places = [row for row, _ in found]
    if source.format in ("jsonl", "text"):
        assert places[0] == 0 and places == sorted(set(places))
    else:
        assert places == list(range(len(ROWS)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.parquet", "x.arrow"])
def test_one_file_is_cut_into_units_of_the_wanted_size(name: str, write_rows: Any, source_of: Any) -> None:
    source = source_of(write_rows(name, ROWS))
    assert len(plan_units([source], 1)) >= 4
    assert len(plan_units([source], 2**24)) == 1


def test_units_number_the_files_of_a_split_in_order(write_rows: Any, source_of: Any) -> None:
    sources = [source_of(write_rows(name, ROWS)) for name in ("a.csv", "b.jsonl")]
    units = plan_units(sources, 100)
    assert units[0] == Unit(0, 0, Span())
    assert {unit.file for unit in units[1:]} == {1}


LINES = st.lists(
    st.one_of(
        st.text(alphabet=st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=30),
        st.sampled_from(["", "  ", "\t", "x" * 500]),
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, rank_exit=st.sampled_from(["\n", "\r\n"]), closed=st.booleans(), bom=st.booleans(), data=st.data())
def test_units_of_any_size_together_read_what_one_reads(
    tmp_path: Path, lines: list[str], rank_exit: str, closed: bool, bom: bool, data: st.DataObject
) -> None:
    content = rank_exit.join(lines) + (rank_exit if closed else "")
    path = tmp_path / "lines.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.encode())
    (source,) = find_sources([str(path)], None, "x")
    whole = read_all(source, 2**24, {"text": "text"})
    expected = [line for line in content.split("\n") if line.encode().strip(b" \t\r\n\x0b\x0c")]
    assert [fields["text"] for _, fields in whole] == [line.removesuffix("\r") for line in expected]
    unit_bytes = data.draw(st.integers(1, max(len(path.read_bytes()), 1)))
    assert read_all(source, unit_bytes, {"text": "text"}) == whole


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.sampled_from(["good", "json", "list", "utf8", "surrogate", "deep"]), min_size=1, max_size=30))
def test_malformed_lines_are_counted_exactly(tmp_path: Path, rows: list[str]) -> None:
    lines = {
        "good": b'{"text": "a", "label": 1}',
        "json": b'{"text": "a"',
        "list": b'["text"]',
        "utf8": b'{"text": "\xff"}',
        "surrogate": b'{"text": "\\ud83d"}',
        "deep": b"[" * 3000,
    }
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"\n".join(lines[row] for row in rows))
    (source,) = find_sources([str(path)], None, "x")
    found = read_all(source, 64)
    assert [fields is not None for _, fields in found] == [row == "good" for row in rows]
    assert [row for row, _ in found] == [sum(len(lines[row]) + 1 for row in rows[:place]) for place in range(len(rows))]


def test_an_escaped_surrogate_pair_is_a_character(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert read_all(source_of(path), 100) == [(0, {"text": "😀"})]
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}]')
    assert read_all(source_of(path), 100) == [(0, {"text": "😀"}), (1, None)]


def test_csv_rows_are_malformed_one_by_one(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext,label\r\n"two\nlines, ""quoted""",good\r\nonly one\r\n'
        b'\r\n\xff,bad\r\n"a"b,bad\r\n,good\r\na,bad'
    )
    assert read_all(source_of(path), 1) == [
        (0, {"text": 'two\nlines, "quoted"', "label": "good"}),
        (1, None),
        (2, None),
        (3, None),
        (4, {"text": None, "label": "good"}),
        (5, {"text": "a", "label": "bad"}),
    ]


def test_quotation_marks_are_text_in_tsv(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"a\tgood\n')
    assert read_all(source_of(path), 1) == [(0, {"text": '"a', "label": "good"})]


def test_parquet_strings_that_are_not_utf8_cost_their_own_row(tmp_path: Path, source_of: Any) -> None:
    import pyarrow.parquet as pq

    broken = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    found = read_all(source_of(tmp_path / "x.parquet"), 2**20, {"text": "text"})
    assert found == [(0, {"text": "a"}), (1, None), (2, {"text": "c"})]


def test_json_is_streamed_across_blocks(tmp_path: Path, source_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.sources.formats import document

    monkeypatch.setattr(document, "BLOCK_CHARS", 3)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"n": 1234567890, "s": [1.5e10], "data": [*ROWS, 12345, None]}, indent=3))
    assert read_all(source_of(path), 1) == [*enumerate(ROWS), (7, None), (8, None)]


def test_columns_are_read_under_the_names_the_data_gives_them(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"review": "a", "text": "b"}\n{"text": "c"}\n')
    found = read_all(source_of(path), 100, {"text": "review"})
    assert [fields for _, fields in found] == [{"text": "a"}, {}]


NOT_AS_NAMED: dict[str, tuple[bytes, str]] = {
    "a.parquet": (b'{"text": "a"}\n', "expected a Parquet file"),
    "b.arrow": (b'{"text": "a"}\n', "expected an Arrow IPC file"),
    "c.jsonl.gz": (b'{"text": "a"}\n', "expected gzip-compressed one JSON object a line"),
    "d.jsonl": (b"\x00\x01\x02\x03" * 100, "found binary data"),
    "e.jsonl": (gzip.compress(b'{"text": "a"}\n'), "found gzip data"),
    "f.jsonl": (b'[\n  {\n "text": "a"\n }\n]\n', "set data.format: json "),
    "g.jsonl": (b"just words\nand more\n", "lines such as 'just words'"),
    "h.json": (b'{"text": "a"}\n{"text": "b"}\n', "set data.format: jsonl"),
    "i.json": (b'"a string"', "document that begins with"),
    "j.json": (b'{"text": "a"}', "keys text and no list under `data`"),
    "k.json": (b"[1, 2]", "elements are not objects"),
    "l.json": (b'[{"text": "a"}, {"te', "expected a JSON list"),
    "m.json": (b'[{"text": "\xff"}]', "utf-8"),
    "n.txt": ("text".encode("utf-16"), "UTF-16"),
    "o.csv": (b"PAR1rest", "a Parquet file"),
    "p.csv": (b"a,a\n1,2\n", "the column 'a' twice"),
    "q.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "r.tsv": (b"<!DOCTYPE html><html>", "an HTML page"),
    "s.jsonl.zst": (b"plain", "expected zstd-compressed"),
    "t.parquet": (b"", "an empty file"),
}


@pytest.mark.parametrize("name", NOT_AS_NAMED)
def test_a_file_that_is_not_what_its_name_says_is_refused(name: str, tmp_path: Path, source_of: Any) -> None:
    content, says = NOT_AS_NAMED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_columns([source_of(path)], COLUMNS, [("text",)], "data.train")
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_all_refused_files_are_named_at_once(tmp_path: Path, source_of: Any) -> None:
    for name in ("a.parquet", "d.jsonl"):
        (tmp_path / name).write_bytes(NOT_AS_NAMED[name][0])
    sources = [source_of(tmp_path / name) for name in ("a.parquet", "d.jsonl")]
    with pytest.raises(DataError, match=r"(?s)2 files.*a\.parquet.*d\.jsonl"):
        check_columns(sources, COLUMNS, [("text",)], "data.train")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.zst", "x.json.gz"])
def test_a_truncated_archive_is_refused_and_not_read_as_short(name: str, write_rows: Any, source_of: Any) -> None:
    path = write_rows(name, [{"text": str(index) * 50, "label": "good"} for index in range(20_000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cannot be read to its end"):
        read_all(source_of(path), 2**20)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.zst", "x.json.gz", "x.txt.zst", "x.parquet", "x.arrow"])
def test_a_small_file_that_is_cut_short_is_told_so(name: str, write_rows: Any, source_of: Any) -> None:
    path = write_rows(name, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"(data|file) that is cut short or damaged \(.*\)\. Fetch or write it again"):
        check_columns([source_of(path)], {"text": "text"}, [("text",)], "data.train")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json", "x.parquet", "x.arrow"])
def test_a_missing_column_is_refused_with_the_nearest(name: str, write_rows: Any, source_of: Any) -> None:
    source = source_of(write_rows(name, ROWS))
    with pytest.raises(JobError) as caught:
        check_columns([source], {"text": "text", "label": "lable"}, [("text", "label")], "data.train")
    message = str(caught.value)
    assert "no column 'lable'" in message and "columns here: text, label" in message
    assert "data.columns: {label: label}" in message


def test_a_column_missing_in_some_rows_is_left_to_the_ledger(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "label": "good"}\nnot json\n')
    check_columns([source_of(path)], COLUMNS, [("text", "label")], "data.train")


def test_an_empty_file_has_no_columns_to_miss(tmp_path: Path, source_of: Any) -> None:
    for name in ("x.jsonl", "x.csv", "x.json", "x.txt"):
        (tmp_path / name).write_bytes(b"[]" if name == "x.json" else b"")
        source = source_of(tmp_path / name)
        check_columns([source], COLUMNS, [("text",)], "data.train")
        assert read_all(source, 100) == []


SFT = {field: field for fields in TASK_FIELDS["sft"] for field in fields}


@pytest.mark.parametrize(
    ("row", "columns", "problem"),
    [
        ({"messages": []}, SFT, None),
        ({"prompt": "a", "completion": "b"}, SFT, None),
        ({"prompt": "a"}, SFT, "no column 'completion' (nor 'messages', nor 'conversations'"),
        ({"conversation": []}, SFT, "data.columns: {messages: conversation}"),
        ({"talk": []}, SFT, "no column 'messages' (nor 'prompt' and 'completion', nor"),
        ({"ask": "a", "answer": "b"}, {**SFT, "prompt": "ask", "completion": "answer"}, None),
        ({"ask": "a"}, {**SFT, "prompt": "ask", "completion": "answer"}, "no column 'answer' (nor 'messages', nor"),
        ({"instruction": "a", "input": "", "response": "b"}, SFT, "data.columns: {output: response}"),
        ({"question": "a", "answer": "b"}, SFT, "data.columns: {instruction: question, output: answer}"),
        ({"prompt": "a", "generation": "b"}, SFT, "data.columns: {instruction: prompt, output: generation}"),
        ({"INSTRUCTION": "a", "RESPONSE": "b"}, SFT, "data.columns: {instruction: INSTRUCTION, output: RESPONSE}"),
        (
            {"system_prompt": "a", "question": "b", "response": "c"},
            SFT,
            "data.columns: {instruction: question, output: response, system: system_prompt}",
        ),
        (
            {"instruction": "a", "context": "b", "response": "c"},
            SFT,
            "data.columns: {input: context, output: response}",
        ),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, SFT, "these are steps with a verdict each"),
        ({"text": "a"}, SFT, "these are plain texts, of which task: pretrain learns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, SFT, "these are preference pairs"),
        ({"chosen_messages": [], "rejected_messages": []}, SFT, "these are preference pairs"),
        ({"segments": [{"label": True, "text": "a"}]}, SFT, "these are segments"),
        ({"input_ids": [1], "labels": [1]}, SFT, "these are token ids"),
    ],
)
def test_sft_needs_messages_or_prompt_and_completion(
    row: dict[str, Any], columns: dict[str, str], problem: str | None, write_rows: Any, source_of: Callable[..., Any]
) -> None:
    source = source_of(write_rows("x.jsonl", [row]))
    if problem is None:
        check_columns([source], columns, needed_fields("sft"), "data.train")
        return
    with pytest.raises(JobError) as caught:
        check_columns([source], columns, needed_fields("sft"), "data.train")
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_fields_may_stand_inside_a_structure(kind: str, write_rows: Any, source_of: Callable[..., Any]) -> None:
    rows = [
        {"id": 1, "translation": {"en": "a film", "fr": "un film"}},
        {"id": 2, "translation": {"en": "b", "fr": None}},
    ]
    source = source_of(write_rows(f"x.{kind}", rows))
    columns = {"source": "translation.en", "target": "translation.fr"}
    check_columns([source], columns, [("source", "target")], "data.train")
    found = [fields for _, fields in read_all(source, 2**20, columns)]
    assert found == [{"source": "a film", "target": "un film"}, {"source": "b", "target": None}]
    with pytest.raises(JobError, match=r"no column 'translations\.en'"):
        check_columns([source], {**columns, "source": "translations.en"}, [("source", "target")], "data.train")
    plain = source_of(write_rows("y.jsonl", [{"a.b": "x"}]))
    assert [fields for _, fields in read_all(plain, 2**20, {"text": "a.b"})] == [{"text": "x"}]


def test_nested_values_that_flat_files_hold_as_text_are_read(tmp_path: Path, source_of: Any) -> None:
    rows = [{"tokens": ["it's", 'a "film"'], "tags": ["O", "B-x"]}, {"tokens": ["a, b"], "tags": ["O"]}]
    for write in (json.dumps, repr):
        with (tmp_path / "x.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ("tokens", "tags"))
            writer.writeheader()
            writer.writerows({name: write(value) for name, value in row.items()} for row in rows)
        found = read_all(source_of(tmp_path / "x.csv"), 100, {"tokens": "tokens", "tags": "tags"})
        assert [fields for _, fields in found] == rows
    (tmp_path / "x.csv").write_text("tokens,tags\n[the film,O O\n")
    found = read_all(source_of(tmp_path / "x.csv"), 100, {"tokens": "tokens", "tags": "tags"})
    assert found == [(0, {"tokens": "[the film", "tags": "O O"})]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": json.dumps([{"role": "user", "content": "a"}])}))
    assert read_all(source_of(tmp_path / "x.jsonl"), 100, {"messages": "messages"})[0][1] == {
        "messages": [{"role": "user", "content": "a"}]
    }


def test_the_languages_of_a_prompt_are_columns_that_every_file_must_have(
    write_rows: Any, source_of: Callable[..., Any]
) -> None:
    source = source_of(write_rows("x.jsonl", [{"source": "a", "target": "b"}]))
    columns = {name: name for name in ("source", "target", "source_language", "target_language")}
    check_columns([source], columns, needed_fields("seq2seq", "{source}"), "data.train")
    with pytest.raises(JobError, match="no column 'target_language'"):
        check_columns([source], columns, needed_fields("seq2seq", "to {target_language}: {source}"), "data.train")


def test_an_index_of_data_sets_is_named_for_what_it_is(tmp_path: Path, source_of: Any) -> None:
    entries = {"mine": {"file_name": "mine.json"}, "theirs": {"hf_hub_url": "a/b", "formatting": "sharegpt"}}
    for content, found in ((entries, "found an index of data sets"), ({"a": {"b": 1}}, "no list under `data`")):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=found):
            check_columns([source_of(tmp_path / "x.json")], SFT, needed_fields("sft"), "data.train")
