"""Patterns become files, or one message that says what is wrong with all of them."""

from pathlib import Path

import pyarrow.fs as pafs
import pytest

from trainers.errors import JobError
from trainers.sources import files as sources
from trainers.sources.files import find_sources, source_key


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl", "a.jsonl", "c.csv.gz", "deep/d.jsonl", "deep/er/e.jsonl", "deep/_SUCCESS", "deep/.f.jsonl",
        "deep/README.md", "mixed/x.jsonl", "mixed/README.txt", "odd[1].jsonl", "none/notes.md",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')
    return tmp_path


def names(tree: Path, *patterns: str, format: str | None = None) -> list[str]:
    found = find_sources([f"{tree}/{pattern}" for pattern in patterns], format, "data.train")  # type: ignore[arg-type]
    return [str(Path(source.uri).relative_to(tree)) for source in found]


def test_paths_globs_and_folders_give_sorted_files_each_once(tree: Path) -> None:
    assert names(tree, "b.jsonl", "[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tree, "**/*.jsonl") == [
        "a.jsonl", "b.jsonl", "deep/d.jsonl", "deep/er/e.jsonl", "mixed/x.jsonl", "odd[1].jsonl"
    ]  # fmt: skip
    assert names(tree, "de*/*.jsonl") == ["deep/d.jsonl"]
    assert names(tree, "?.jsonl") == ["a.jsonl", "b.jsonl"]


def test_a_folder_stands_for_its_data_files_and_nothing_else(tree: Path) -> None:
    assert names(tree, "deep") == ["deep/d.jsonl", "deep/er/e.jsonl"]
    assert names(tree, "deep/") == ["deep/d.jsonl", "deep/er/e.jsonl"]
    assert names(tree, "mixed", format="jsonl") == ["mixed/x.jsonl"]


def test_an_existing_name_with_brackets_is_a_name(tree: Path) -> None:
    assert names(tree, "odd[1].jsonl") == ["odd[1].jsonl"]


def test_format_and_compression_come_from_the_name_unless_given(tree: Path) -> None:
    (found,) = find_sources([f"{tree}/c.csv.gz"], None, "data.train")
    assert (found.format, found.compression) == ("csv", "gzip")
    (found,) = find_sources([f"{tree}/deep/README.md"], "text", "data.train")
    assert (found.format, found.compression) == ("text", None)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("c.jsonl", "did you mean"),
        ("depe/d.jsonl", "does not exist; did you mean"),
        ("*.parquet", "matches no file"),
        ("deep/**", "README.md: its name tells no format"),
        ("mixed", "several formats (jsonl, text)"),
        ("none", "no data file in this folder"),
        ("deep/README.md", "Set data.format"),
    ],
)
def test_a_pattern_that_names_nothing_usable_is_refused_with_the_remedy(tree: Path, pattern: str, says: str) -> None:
    with pytest.raises(JobError, match=r"data\.train") as caught:
        names(tree, pattern)
    assert says in str(caught.value) and f"{tree}/{pattern.rstrip('*')}" in str(caught.value)


def test_all_problems_are_told_at_once(tree: Path) -> None:
    (tree / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(JobError) as caught:
        names(tree, "no.jsonl", "a.jsonl", "neither.csv", "x.parquet.gz", "nowhere/*.csv")
    assert len(caught.value.problems) == 4
    assert "compressed inside the file" in caught.value.problems[2]


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(JobError) as caught:
        find_sources(["hf://squad:train", "ftp://host/x.jsonl"], None, "data.train")
    assert len(caught.value.problems) == 2


def test_the_digest_is_of_the_content(tree: Path) -> None:
    before = find_sources([f"{tree}/a.jsonl"], None, "x")
    (tree / "moved").mkdir()
    (tree / "a.jsonl").rename(tree / "moved" / "a.jsonl")
    moved = find_sources([f"{tree}/moved/a.jsonl"], None, "x")
    assert source_key(before) == source_key(moved)
    (tree / "moved" / "a.jsonl").write_text('{"text": "b.jsonl"}\n')
    assert source_key(before) != source_key(find_sources([f"{tree}/moved/a.jsonl"], None, "x"))
    assert source_key(moved) != source_key(find_sources([f"{tree}/b.jsonl"], "text", "x"))


def test_large_files_are_digested_by_their_ends_size_and_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHOLE_DIGEST_BYTES", 10)
    monkeypatch.setattr(sources, "END_BYTES", 4)
    path = tree / "a.jsonl"
    first = find_sources([str(path)], None, "x")[0].digest
    assert first == find_sources([str(path)], None, "x")[0].digest
    path.write_bytes(path.read_bytes()[:-2] + b"]\n")
    assert first != find_sources([str(path)], None, "x")[0].digest


def test_buckets_are_listed_with_their_options_kept(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bucket(path: str) -> tuple[pafs.FileSystem, str]:
        return pafs.SubTreeFileSystem(str(tree), pafs.LocalFileSystem()), path.removeprefix("s3://").partition("?")[0]

    (tree / "bucket").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tree / name).rename(tree / "bucket" / name)
    monkeypatch.setattr(sources, "filesystem_of", bucket)
    found = find_sources(["s3://bucket/*.jsonl?region=eu"], None, "data.train")
    assert [one.uri for one in found] == ["s3://bucket/a.jsonl?region=eu", "s3://bucket/b.jsonl?region=eu"]
    assert find_sources(["s3://bucket?region=eu"], None, "data.train") == found
    with pytest.raises(JobError, match=r"did you mean s3://bucket/a.jsonl"):
        find_sources(["s3://bucket/aa.jsonl?region=eu"], None, "data.train")


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("train.jsonl", "test.jsonl"), True),
        (("train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl"), True),
        (("train/a.jsonl", "dev/a.jsonl"), True),
        (("my_train_1.jsonl", "my_eval_1.jsonl"), True),
        (("train.jsonl", "train-2.jsonl"), False),
        (("latest.jsonl", "trained.jsonl", "contest.jsonl"), False),
        (("test.jsonl", "dev.jsonl"), False),
    ],
)
def test_a_folder_with_files_of_several_splits_is_refused(
    names: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"text": "a"}\n')
    if refused:
        with pytest.raises(JobError, match=r"files of several splits .*; name those that are meant"):
            find_sources([str(tmp_path / "data")], None, "data.train")
    else:
        assert len(find_sources([str(tmp_path / "data")], None, "data.train")) == len(names)
