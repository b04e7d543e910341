"""A quotation mark that is not closed makes one record of many rows: told with its lines, never counted as one row."""

import logging
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import DataError
from trainers.sources.formats import FORMATS
from trainers.sources.readers import plan_units, read_unit

COLUMNS = {"text": "text", "label": "label"}


def read(path: Path, text: str, source_of: Any) -> list[Any]:
    path.write_text(text, newline="")
    source = source_of(path)
    return [fields for unit in plan_units([source], 1) for _, fields in read_unit(unit, source, COLUMNS)]


def rows(start: int, stop: int) -> str:
    return "".join(f"row {number},good\n" for number in range(start, stop))


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (f'text,label\n{rows(0, 500)}"row 500,good\n{rows(501, 1000)}', "lines 502 to 1,001"),
        ('text,label\na,good\n"b,good\n', "line 3"),
        (f'text,label\na,good\n"b,good\n{rows(0, 9)}"c",good\nd,good\n', "lines 3 to 13"),
        (f'text,label\na,good\n"b,good\n{rows(0, 9)}5" c,good\nd,good\n', "lines 3 to 13"),
        (f'text,label\na,good\n"b,good\n{rows(0, 40)}5",good\nd,good\n', "lines 3 to 44"),
        (f'text,label\na,good\nb,"good\n{rows(0, 3)}5",good\nd,good\n', "lines 3 to 7"),
        (f'"text,label\n{rows(0, 9)}', "lines 1 to 10"),
    ],
)
def test_rows_within_quotation_marks_are_refused_with_their_lines(
    text: str, lines: str, separator: str, ending: str, tmp_path: Path, source_of: Any
) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(DataError) as caught:
        read(path, text.replace(",", separator).replace("\n", ending), source_of)
    assert f"{path}: {lines} are one record" in str(caught.value) and "Close that mark" in str(caught.value)


def test_the_line_that_excel_puts_first_counts(tmp_path: Path, source_of: Any) -> None:
    with pytest.raises(DataError, match="lines 3 to 4 are one record"):
        read(tmp_path / "x.csv", 'sep=;\ntext;label\n"b;good\nc;good\n', source_of)


def test_a_header_that_is_not_closed_is_refused_before_anything_runs(tmp_path: Path, source_of: Any) -> None:
    (tmp_path / "x.csv").write_text(f'text,"label\n{rows(0, 9)}')
    with pytest.raises(DataError, match="lines 1 to 10 are one record"):
        FORMATS["csv"].peek(source_of(tmp_path / "x.csv"))


def test_texts_of_several_lines_stay_rows(tmp_path: Path, source_of: Any) -> None:
    poems = ["Roses are red, I know\nviolets\nare blue", "a\n" * 40, "x, y\nz", "points:\n" + "1, 2\n" * 40]
    text = "text,label\n" + "".join(f'"{poem}",good\n' for poem in poems)
    assert [fields["text"] for fields in read(tmp_path / "x.csv", text, source_of)] == poems
    torn = text + '"one\ntwo\nthree",good,more\nb,good\n'
    assert read(tmp_path / "x.csv", torn, source_of)[-2:] == [None, {"text": "b", "label": "good"}]


def test_a_text_whose_lines_look_like_rows_is_kept_and_told(
    tmp_path: Path, source_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    text = f'text,label\na,good\n"b,good\n{rows(0, 2)}5",good\n'
    assert len(read(tmp_path / "x.csv", text, source_of)) == 2
    assert "lines 3 to 6 are one row by quotation marks" in caplog.text
