"""Records as tables for people; `--json` prints the records themselves. The tables of a command stand with it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.report.tables import evaluation_table
from trainers.evaluation.selection import why_not
from trainers.run.folder import Evaluation

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
COLUMNS = 6
"""Metrics in a table of evaluations; the report has them all."""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], styles: Sequence[str] = ()) -> None:
    """Print one table; missing values are dashes."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*(_text(value) for value in row), style=styles[index] if styles else None)
    Console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_evaluations(evaluations: Sequence[Evaluation], metric: str, best_step: int | None, console: Console) -> None:
    """Metrics by step, the deciding one first, the best step marked."""
    every = evaluation_table(evaluations, best_step)
    order = sorted(range(len(every["names"])), key=lambda index: (every["names"][index] != metric, index))[:COLUMNS]
    table = Table(title=f"evaluations, by {metric}")
    table.add_column("step", justify="right")
    for index in order:
        table.add_column(every["names"][index], justify="right")
    table.add_column("")
    reasons = {one.step: why_not(one, metric) for one in evaluations}
    for row in every["rows"]:
        mark = reasons[row["step"]] or ("best" if row["kind"] == "best" else "" if row["step"] else "pretrained")
        style = "bold green" if row["kind"] == "best" else None
        table.add_row(str(row["step"]), *(row["values"][index] for index in order), mark, style=style)
    console.print(table)
