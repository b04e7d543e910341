"""Labels and scores as people write them: names of classes, numbers, blanks, text formats; and the order of logits."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from trainers.errors import DataError, JobError
from trainers.run.record import job_task
from trainers.shards.drop_budget import check_shards
from trainers.shards.manifest import ShardManifest
from trainers.sources.files import find_sources
from trainers.sources.readers import check_columns, plan_units, read_unit

NAMES = ["weather", "sport", "art"]


def classes(**columns: Any) -> datasets.Dataset:
    """A data set whose integers are classes, in a list too."""
    label = datasets.ClassLabel(names=NAMES)
    tags = datasets.ClassLabel(names=["O", "B-per", "I-per"])
    known = {
        "text": datasets.Value("string"),
        "label": label,
        "topics": datasets.Sequence(label),
        "tokens": datasets.Sequence(datasets.Value("string")),
        "tags": datasets.List(tags),
        "parts": [{"kind": label, "text": datasets.Value("string")}],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: known[name] for name in columns}))


def rows_of(source: Any, *columns: str) -> list[Any]:
    (unit,) = plan_units([source])
    return [fields for _, fields in read_unit(unit, source, {name: name for name in columns})]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_numbers_of_declared_classes_become_their_names(kind: str, tmp_path: Path, source_of: Any) -> None:
    data = classes(
        text=["a", "b", "c"],
        label=[2, 0, -1],
        topics=[[0, 1], [], [2]],
        tags=[[0, 1], [1, 2], []],
        parts=[[{"kind": 1, "text": "x"}], [], [{"kind": 0, "text": "y"}]],
    )
    if kind == "parquet":
        data.to_parquet(str(tmp_path / "x.parquet"))
        path = tmp_path / "x.parquet"
    else:
        data.save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    rows = rows_of(source_of(path), "text", "label", "topics", "tags", "parts")
    assert [row["label"] for row in rows] == ["art", "weather", None]
    assert [row["topics"] for row in rows] == [["weather", "sport"], [], ["art"]]
    assert [row["tags"] for row in rows] == [["O", "B-per"], ["B-per", "I-per"], []]
    assert rows[0]["parts"] == [{"kind": "sport", "text": "x"}] and rows[2]["text"] == "c"


def test_a_file_without_declared_classes_keeps_its_numbers(tmp_path: Path, source_of: Any) -> None:
    table = classes(text=["a"], label=[1]).to_pandas()
    pq.write_table(__import__("pyarrow").Table.from_pandas(table), tmp_path / "x.parquet")
    assert rows_of(source_of(tmp_path / "x.parquet"), "text", "label") == [{"text": "a", "label": 1}]


def test_logits_follow_the_order_of_the_declared_classes(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    classes(text=["a film", "the plot", "good"], label=[2, 0, 1]).to_parquet(str(tmp_path / "t.parquet"))
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": "a film", "label": "sport"}))
    job = make_job(train=[tmp_path / "t.parquet"], eval=[tmp_path / "e.jsonl"])
    shards = shard_here(job)
    assert job_task(job, shards.train).labels == tuple(NAMES) and shards.eval.labels == {"sport": 1}


def labels_of(job: Any, shard_here: Any) -> tuple[ShardManifest, tuple[str, ...]]:
    manifest = shard_here(job).train
    return manifest, job_task(job, manifest).labels


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ([10, 2, 0, -1], ("-1", "0", "2", "10")),
        ([2.0, 10.0, 2], ("2", "10")),
        (["b", "10", "2", "a"], ("2", "10", "a", "b")),
        ([True, False], ("False", "True")),
    ],
)
def test_integers_are_ordered_by_value_and_whole_floats_are_integers(
    given: list[Any], labels: tuple[str, ...], make_job: Any, write_rows: Any, shard_here: Any
) -> None:
    path = write_rows("x.jsonl", [{"text": "a film", "label": label} for label in given])
    assert labels_of(make_job(train=[path], eval=[path]), shard_here)[1] == labels


def test_blanks_around_labels_are_trimmed_and_counted_and_empty_labels_are_missing(
    make_job: Any, tmp_path: Path, shard_here: Any
) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text, label\na film, good\nthe plot,good \na plot,good\na,\nb,  \nc,1.0\nd,1\ne,true\nf,True\n")
    job = make_job(train=[path], eval=[path], max_drop_fraction=1.0)
    manifest, labels = labels_of(job, shard_here)
    assert manifest.labels == {"1": 2, "True": 2, "good": 3} and labels == ("1", "True", "good")
    assert manifest.outcomes == {"kept": 7, "dropped:missing_label": 2}
    assert manifest.notes == {"blanks around a label, which were trimmed": 2}


@pytest.mark.parametrize("label", ["", "  ", None, float("nan")])
def test_an_empty_label_is_missing_in_any_format(label: Any, make_job: Any, tmp_path: Path, shard_here: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "a film", "label": one}) + "\n" for one in ("good", label)))
    job = make_job(train=[path], eval=[path], max_drop_fraction=1.0)
    assert shard_here(job).train.outcomes == {"kept": 1, "dropped:missing_label": 1}


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
def test_the_separator_of_a_csv_is_found_and_said(
    separator: str, tmp_path: Path, source_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.csv"
    lines = [["text", "label"], ['"well, no; never| a\tfilm"', "1"], ["a film", "2"]]
    path.write_text("".join(separator.join(line) + "\n" for line in lines))
    source = source_of(path)
    for _ in range(2):
        check_columns([source], {"text": "text", "label": "label"}, [["text", "label"]], "data.train")
    assert caplog.text.count("separates the values") == (0 if separator == "," else 1)
    assert [row["label"] for row in rows_of(source, "text", "label")] == ["1", "2"]
    assert rows_of(source, "text", "label")[0]["text"] == "well, no; never| a\tfilm"


def test_the_line_that_excel_puts_first_is_no_header(tmp_path: Path, source_of: Any) -> None:
    for start in ("sep=;\n", "\ufeffsep=;\r\n"):
        (tmp_path / "x.csv").write_text(f"{start}text;label\na film;1\n", newline="")
        source = source_of(tmp_path / "x.csv")
        check_columns([source], {"text": "text", "label": "label"}, [["text", "label"]], "data.train")
        assert rows_of(source, "text", "label") == [{"text": "a film", "label": "1"}]


def test_tsv_without_tabs_is_refused_and_quoted_values_are_told(
    tmp_path: Path, source_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.tsv").write_text("text;label\na film;1\n")
    with pytest.raises(DataError, match=r"no tab in the header 'text;label'. Name it .csv, .* finds the ';'"):
        check_columns([source_of(tmp_path / "x.tsv")], {"text": "text"}, [["text"]], "data.train")
    (tmp_path / "y.tsv").write_text('text\tlabel\n"a film ""x"""\t1\n')
    for _ in range(2):
        check_columns([source_of(tmp_path / "y.tsv")], {"text": "text"}, [["text"]], "data.train")
    assert caplog.text.count("values stand in quotation marks") == 1
    assert rows_of(source_of(tmp_path / "y.tsv", "csv"), "text") == [{"text": 'a film "x"'}]
    caplog.clear()
    (tmp_path / "z.tsv").write_text('text\tlabel\nthe "film\t1\na 5" plot\t2\n')
    check_columns([source_of(tmp_path / "z.tsv")], {"text": "text"}, [["text"]], "data.train")
    assert "quotation" not in caplog.text


def test_a_file_without_a_header_is_told_so(tmp_path: Path, source_of: Any) -> None:
    (tmp_path / "x.csv").write_text("a film,good\na plot,bad\n")
    with pytest.raises(JobError, match="Where the first line is no header, write one"):
        check_columns([source_of(tmp_path / "x.csv")], {"text": "text"}, [["text"]], "data.train")


def test_a_folder_that_datasets_saved_is_its_data_and_several_splits_are_refused(tmp_path: Path) -> None:
    data = classes(text=["a", "b"], label=[2, 0])
    data.save_to_disk(str(tmp_path / "one"))
    (source,) = find_sources([str(tmp_path / "one")], None, "data.train")
    assert [row["label"] for row in rows_of(source, "text", "label")] == ["art", "weather"]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(JobError, match="several splits here; name the folder of one"):
        find_sources([str(tmp_path / "two")], None, "data.train")
    assert find_sources([str(tmp_path / "two" / "test")], None, "data.train")


def test_classes_inside_a_structure_keep_their_names_and_order(make_job: Any, tmp_path: Path, shard_here: Any) -> None:
    inner = {"kind": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    rows = {"part": [{"kind": kind, "text": "a film"} for kind in (2, 0, 1)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"part": inner}))
    data.to_parquet(str(tmp_path / "x.parquet"))
    path = tmp_path / "x.parquet"
    job = make_job(train=[path], eval=[path], columns={"text": "part.text", "label": "part.kind"})
    assert labels_of(job, shard_here)[1] == tuple(NAMES)


def test_integers_keep_their_order_beside_names(make_job: Any, write_rows: Any, shard_here: Any) -> None:
    rows = [{"text": "a film", "label": label} for label in ("other", 10, 2, "all", -1)]
    path = write_rows("x.jsonl", rows)
    assert labels_of(make_job(train=[path], eval=[path]), shard_here)[1] == ("-1", "2", "10", "all", "other")


def test_a_csv_of_one_column_is_not_cut_by_what_stands_in_its_texts(tmp_path: Path, source_of: Any) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text\na;b\nc;d\n")
    assert rows_of(source_of(path), "text") == [{"text": "a;b"}, {"text": "c;d"}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_scores_written_as_text_are_numbers(kind: str, make_job: Any, write_rows: Any, shard_here: Any) -> None:
    rows = [{"sentence1": "a film", "sentence2": "a plot", "score": score} for score in ("5.0", "1", "1e-1", "many")]
    path = write_rows(f"x.{kind}", rows)
    job = make_job("similarity", train=[path], eval=[path], score_range=[0, 5], max_drop_fraction=1.0)
    assert shard_here(job).train.outcomes == {"kept": 3, "dropped:score_not_a_number": 1}


def test_a_decimal_comma_is_named(make_job: Any, tmp_path: Path, shard_here: Any) -> None:
    (tmp_path / "x.csv").write_text("sentence1;sentence2;score\na film;a plot;4,5\na film;a plot;4.5\n")
    job = make_job("similarity", train=[tmp_path / "x.csv"], eval=[tmp_path / "x.csv"], score_range=[0, 5])
    assert shard_here(job).train.outcomes == {"kept": 1, "dropped:score_with_a_decimal_comma": 1}


def write_csv(folder: Path, rows: list[dict[str, str]], name: str = "x.csv") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_several_labels_in_one_text_are_taken_apart(
    kind: str, make_job: Any, write_rows: Any, shard_here: Any, tmp_path: Path
) -> None:
    cells = ["['a', 'b']", '["b", "c"]', "a", "[]", "('a',)", "a; c", "b ;c;", "[2, 1]"]
    rows = [{"text": "a film", "label": cell} for cell in cells]
    path = write_csv(tmp_path, rows) if kind == "csv" else write_rows("x.jsonl", rows)
    manifest = shard_here(make_job(train=[path], eval=[path], multi_label=True)).train
    assert manifest.labels == {"1": 1, "2": 1, "a": 4, "b": 3, "c": 3} and manifest.outcomes == {"kept": 8}
    assert manifest.notes == {"several labels in one text, cut at ';'": 2}


@pytest.mark.parametrize("cell", ["['a' 'b']", "[a, b]", "[a", "a, b; c", "{'a'}", "[07]"])
def test_labels_that_can_be_read_in_two_ways_are_dropped_with_the_rule(
    cell: str, make_job: Any, tmp_path: Path, shard_here: Any
) -> None:
    path = write_csv(tmp_path, [{"text": "a film", "label": label} for label in ("a", cell)])
    job = make_job(train=[path], eval=[path], multi_label=True, max_drop_fraction=1.0)
    (kept, dropped) = sorted(shard_here(job).train.outcomes, reverse=True)
    assert kept == "kept" and dropped.startswith("dropped:labels_in_one_text: not a list as in JSON")


def test_rows_that_are_cut_in_different_ways_refuse_the_data(make_job: Any, tmp_path: Path, shard_here: Any) -> None:
    path = write_csv(tmp_path, [{"text": "a film", "label": label} for label in ("a;b", "a;c", "Nice, France")])
    other = write_csv(tmp_path, [{"text": "a film", "label": "a"}], "y.csv")
    job = make_job(train=[path], eval=[other], multi_label=True)
    with pytest.raises(DataError, match=r"cut at ';' in 2 rows and ',' in 1 rows"):
        check_shards(job, shard_here(job))
