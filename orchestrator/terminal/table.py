"""Records as tables for people; `--json` prints the records themselves. The tables of a command stand with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.report.table import Table
from orchestrator.report.tables import NOTHING, evaluation_table
from trainers.run.describe import interval
from trainers.run.folder import Evaluation
from trainers.verification.verdict import Verification

STYLES = {"best": "bold green", "failure": "red", "ok": "green", "warn": "yellow", "fail": "bold red"}
"""How a row is marked, by its kind."""
COLUMNS = 6
"""Metrics in a table of evaluations; the report has them all."""
FIRST = 18
"""Characters of such a table's first column; longer names fold."""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], kinds: Sequence[str] = ()) -> None:
    """Print one table; missing values are dashes."""
    show_table(Table(title, columns, rows, kinds))


def show_table(table: Table, console: Console | None = None, first: int | None = None) -> None:
    """Print a table that the report page shows too.

    Args:
        first: characters of the first column at the most.
    """
    rich = RichTable(title=table.title, title_justify="left")
    for index, name in enumerate(table.columns):
        rich.add_column(name, overflow="fold", max_width=None if index else first)
    for number, cells in enumerate(table.texts()):
        rich.add_row(*map(_cell, cells), style=STYLES.get(table.kind(number)))
    (console or Console(emoji=False)).print(rich)


def _cell(text: str) -> Text:
    """What stands below a value is paler."""
    value, line, below = text.partition("\n")
    return Text.assemble(value, (line + below, "dim"))


def show_evaluations(
    evaluations: Sequence[Evaluation],
    metric: str,
    best_step: int | None,
    console: Console,
    baselines: Mapping[str, Mapping[str, float]] = NOTHING,
) -> None:
    """Metrics by step, the deciding one first, the best step marked; as many as the terminal has room for."""
    tables = [evaluation_table(evaluations, metric, best_step, most, baselines) for most in range(COLUMNS, 0, -1)]
    show_table(next((table for table in tables if _width(table) <= console.width), tables[-1]), console, FIRST)


def show_metrics(model: str, metric: str, found: Mapping[str, Any]) -> None:
    """What `evaluate_folder` found, a metric a line, the deciding one first; without those by class."""
    names = sorted((name for name in found["metrics"] if "/" not in name), key=lambda name: (name != metric, name))
    between = {name: interval(*pair) for name, pair in found["intervals"].items()}
    rows = [(name, found["metrics"][name], between.get(name)) for name in names]
    show(
        f"{model} on {found['rows']:,} rows",
        ("metric", "value", "95 % interval"),
        rows,
        ["best" if name == metric else "" for name in names],
    )


def _width(table: Table) -> int:
    """Characters of a line, but for the last column, whose reasons fold."""
    first, *others, _ = zip(table.columns, *table.texts(), strict=True)
    lines = [[line for cell in cells for line in cell.split("\n")] for cells in others]
    widths = [min(FIRST, max(map(len, first))), *(max(map(len, each)) for each in lines)]
    return sum(width + len(" │ ") for width in widths) + len("│ best │")


def show_rows(title: str, records: Sequence[dict[str, Any]]) -> None:
    """Print records with the same keys, one a row."""
    show(title, list(records[0]) if records else ("none",), [list(record.values()) for record in records])


def show_verification(found: Verification) -> None:
    """One line a self-test."""
    rows = [(one.name, "ok" if one.passed else "fail", one.detail, f"{one.seconds:.1f}") for one in found.checks]
    part = f", first {found.layers} layers" if found.layers else ""
    title = f"self-tests of task {found.task} with {found.attention} attention on {found.device}{part}, key {found.key}"
    show(title, ("test", "state", "found", "seconds"), rows, [row[1] for row in rows])
