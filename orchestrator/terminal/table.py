"""Records as tables for people; `--json` prints the records themselves. The tables of a command stand with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.report.table import Table
from orchestrator.report.tables import NOTHING, evaluation_table
from trainers.run.folder import Evaluation
from trainers.verification.verdict import Verification

STYLES = {"best": "bold green", "failure": "red", "ok": "green", "warn": "yellow", "fail": "bold red"}
"""How a row is marked, by its kind."""
COLUMNS = 6
"""Metrics in a table of evaluations; the report has them all."""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], kinds: Sequence[str] = ()) -> None:
    """Print one table; missing values are dashes."""
    show_table(Table(title, columns, rows, kinds))


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table that the report page shows too."""
    rich = RichTable(title=table.title, title_justify="left")
    for name in table.columns:
        rich.add_column(name, overflow="fold")
    for number, cells in enumerate(table.texts()):
        rich.add_row(*map(Text, cells), style=STYLES.get(table.kind(number)))
    (console or Console()).print(rich)


def show_evaluations(
    evaluations: Sequence[Evaluation],
    metric: str,
    best_step: int | None,
    console: Console,
    intervals: Mapping[str, tuple[float, float]] = NOTHING,
    baselines: Mapping[str, Mapping[str, float]] = NOTHING,
) -> None:
    """Metrics by step, the deciding one first, the best step marked; as many as the terminal has room for."""
    tables = [
        evaluation_table(evaluations, metric, best_step, most, intervals, baselines) for most in range(COLUMNS, 0, -1)
    ]
    show_table(next((table for table in tables if _width(table) <= console.width), tables[-1]), console)


def _width(table: Table) -> int:
    """Characters of a line, but for the last column, whose reasons fold."""
    columns = list(zip(table.columns, *table.texts(), strict=True))[:-1]
    return sum(max(map(len, cells)) + len(" │ ") for cells in columns) + len("│ best │")


def show_rows(title: str, records: Sequence[dict[str, Any]]) -> None:
    """Print records with the same keys, one a row."""
    show(title, list(records[0]) if records else ("none",), [list(record.values()) for record in records])


def show_verification(found: Verification) -> None:
    """One line a self-test."""
    rows = [(one.name, "ok" if one.passed else "fail", one.detail, round(one.seconds, 1)) for one in found.checks]
    title = f"self-tests of task {found.task} with {found.attention} attention, key {found.key}"
    show(title, ("test", "state", "found", "seconds"), rows, [row[1] for row in rows])
