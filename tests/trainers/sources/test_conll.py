"""Sentences in columns, as tagged text is published."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import DataError
from trainers.sources.formats import FORMATS
from trainers.sources.readers import check_columns, plan_units, read_unit

COLUMNS = {"tokens": "tokens", "tags": "tags"}
TEXT = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def rows_of(source: Any, **columns: str) -> list[Any]:
    return [fields for unit in plan_units([source]) for _, fields in read_unit(unit, source, COLUMNS | columns)]


def read(tmp_path: Path, source_of: Any, text: str, name: str = "x.conll") -> list[Any]:
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return rows_of(source_of(tmp_path / name))


@pytest.mark.parametrize("name", ["x.conll", "x.iob2.gz", "x.bio"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_first_column_is_the_words_and_the_last_the_tags(
    name: str, ending: str, tmp_path: Path, source_of: Any
) -> None:
    assert read(tmp_path, source_of, "\ufeff" + TEXT.replace("\n", ending), name) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter", "Blackburn"], "tags": ["B-PER", "I-PER"]},
    ]


def test_any_column_can_be_chosen_by_its_number(tmp_path: Path, source_of: Any) -> None:
    (tmp_path / "x.conll").write_text(TEXT)
    source = source_of(tmp_path / "x.conll")
    assert rows_of(source, tags="3")[1]["tags"] == ["B-NP", "I-NP"]
    check_columns([source], COLUMNS | {"tags": "3"}, [["tokens", "tags"]], "data.train")


@pytest.mark.parametrize("blank", ["\n", "  \n", "\t\n", "\n\n\n"])
def test_two_columns_with_tabs_and_any_blank_line(blank: str, tmp_path: Path, source_of: Any) -> None:
    found = read(tmp_path, source_of, f"New York\tB-LOC\n.\tO\n{blank}a\tO")
    assert found == [{"tokens": ["New York", "."], "tags": ["B-LOC", "O"]}, {"tokens": ["a"], "tags": ["O"]}]


def test_comments_are_no_words_and_hash_signs_are(tmp_path: Path, source_of: Any) -> None:
    text = "# id 7 domain=en\n# newdoc\n#film O\n# O\nis O\n#great B-x\n\n#just O\n\n# nothing else\n"
    assert [row["tokens"] for row in read(tmp_path, source_of, text)] == [["#film", "#", "is", "#great"], ["#just"]]


@pytest.mark.parametrize("separator", [" ", "  ", "\t"])
@pytest.mark.parametrize("word", ["10\u00a0000", "\u3000", "\u2009a", "b\u3000"])
def test_white_space_other_than_blanks_belongs_to_the_words(
    word: str, separator: str, tmp_path: Path, source_of: Any
) -> None:
    text = f"in{separator}O\n{word}{separator}O\n  oslo {separator}B-LOC \n"
    assert read(tmp_path, source_of, text) == [{"tokens": ["in", word, "oslo"], "tags": ["O", "O", "B-LOC"]}]


def test_conllu_has_its_words_in_the_second_column(tmp_path: Path, source_of: Any) -> None:
    def line(number: str, form: str, tag: str) -> str:
        return "\t".join([number, form, form, tag, *"_" * 6])

    lines = ["# text = vámonos a b c d e f g", line("1-2", "vámonos", "_"), line("1", "vamos", "VERB"),
             line("1.1", "x", "_"), line("2", "nos", "PRON")]  # fmt: skip
    assert read(tmp_path, source_of, "\n".join(lines) + "\n", "x.conllu") == [
        {"tokens": ["vamos", "nos"], "tags": ["VERB", "PRON"]}
    ]


def test_a_torn_sentence_is_malformed_and_the_others_stay(tmp_path: Path, source_of: Any) -> None:
    (tmp_path / "x.conll").write_bytes(b"a O\nb\n\nc O\n\n\xff\xfe\x80 O\n\nd B-x\n")
    assert rows_of(source_of(tmp_path / "x.conll")) == [
        None,
        {"tokens": ["c"], "tags": ["O"]},
        None,
        {"tokens": ["d"], "tags": ["B-x"]},
    ]


def test_a_file_of_another_kind_is_refused(tmp_path: Path, source_of: Any) -> None:
    (tmp_path / "x.conll").write_text("The film is good.\nAnd the plot too, I think.\n")
    with pytest.raises(DataError, match="a word a line"):
        FORMATS["conll"].peek(source_of(tmp_path / "x.conll"))


def test_text_files_are_columns_for_the_task_tag(tmp_path: Path, make_job: Any, shard_here: Any) -> None:
    (tmp_path / "train.txt").write_text(TEXT)
    shards = shard_here(make_job("tag", train=[tmp_path / "train.txt"], eval=[tmp_path / "train.txt"]))
    assert shards.train.outcomes == {"kept": 2} and shards.train.labels == {"B-ORG": 1, "B-PER": 1, "I-PER": 1, "O": 1}
