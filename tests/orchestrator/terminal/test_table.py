"""Evaluations in a terminal: as many metrics as its width has room for, none of them cut or folded."""

import io

import pytest
from rich.console import Console

from orchestrator.terminal.table import show_evaluations
from trainers.run.folder import Evaluation

METRICS = ("f1_macro", "accuracy", "auroc", "f1_micro", "f1_weighted", "loss", "mcc")


@pytest.mark.parametrize(("width", "shown"), [(80, 6), (60, 4), (200, 6)])
def test_a_line_fits_the_terminal_and_the_deciding_metric_comes_first(width: int, shown: int) -> None:
    metrics = dict.fromkeys(METRICS, 0.1234)
    records = [Evaluation(step=step, status="done", metrics=metrics, eval_key="k", rows=9) for step in (20, 114)]
    console = Console(width=width, file=io.StringIO())
    show_evaluations(records, "f1_macro", 114, console)
    _title, _, header, _, first, second, _ = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    names = [name.strip() for name in header.split("┃")[1:-1]]
    assert names[:2] == ["step", "f1_macro"] and len(names) == shown + 2
    assert set(names) - {"step", ""} <= set(METRICS)
    assert "best" in second and "best" not in first
    assert len(header) <= width
