"""What the user sees of a run: progress bars on a terminal, lines with values elsewhere, a table at the end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.sharding.stage import ShardProgress
from trainers.run.folder import RunResult
from trainers.storage import Folder

LINES_PER_STAGE = 20
"""Off a terminal, a stage prints about this many lines, however long it is."""
ANNOUNCED = (
    "start",
    "verification",
    "checkpoint",
    "checkpoint_skipped",
    "checkpoint_quarantined",
    "evaluation",
    "stop",
)
COLUMNS = 6
"""Metrics in the final table."""
PRINTED = ("verification", "checkpoint_skipped", "checkpoint_quarantined")
"""Events that a terminal shows as lines between its bars; elsewhere ANNOUNCED."""


class Screen:
    """Standard output of one command."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=32), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self._progress = Progress(*columns, console=self.console)
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    @contextmanager
    def live(self) -> Iterator["Screen"]:
        """Show bars for the length of the block, where there is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        with self._progress:
            yield self

    def advance(self, stage: str, done: int, total: int, note: str = "") -> None:
        """A stage has come this far."""
        if self.console.is_terminal:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=total, note=note)
            self._progress.update(self._bars[stage], completed=done, total=total, note=note)
            return
        tick = done * LINES_PER_STAGE // max(total, 1)
        if tick != self._said.get(stage) or done == total:
            self._said[stage] = tick
            self.say(f"{stage}: {done}/{total} {note}".rstrip())

    def say(self, line: str) -> None:
        """One line of text."""
        self.console.print(line, highlight=False, markup=False)

    def on_shards(self, progress: ShardProgress) -> None:
        """A bar a split."""
        note = f"{progress.rows:,} rows, {progress.tokens:,} tokens"
        self.advance(f"{progress.split} data", progress.units_done, progress.units_total, note)

    def on_event(self, event: Mapping[str, Any], steps: int) -> None:
        """Show an event of the run's log."""
        if event["kind"] == "step":
            note = f"loss {event['loss']:.4f}  {event['tokens_per_s']:,.0f} tokens/s"
            self.advance("train", event["step"], steps, note)
        elif event["kind"] in (PRINTED if self.console.is_terminal else ANNOUNCED):
            self.say(describe(event))

    def results(self, run: Folder, result: RunResult) -> None:
        """The final table (every metric by step, the best marked), the registered version and where to look."""
        metric = str((result.best or {}).get("metric", ""))
        self._evaluations(result, metric)
        if result.registry:
            alias = f" ({result.registry.alias})" if result.registry.alias else ""
            self.say(f"model   {result.registry.model} version {result.registry.version}{alias}")
            self.say(f"folder  {result.registry.source}")
        self.say(f"report  {run}/report.html")
        self.say(f"curves  tensorboard --logdir {run}/tensorboard")

    def _evaluations(self, result: RunResult, metric: str) -> None:
        done = [one for one in result.evaluations if one.status == "done"]
        every = dict.fromkeys(name for one in done for name in one.metrics)
        names = sorted(every, key=lambda name: name != metric)[:COLUMNS]  # the report has them all
        table = Table(title=f"evaluations, by {metric}")
        table.add_column("step", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        table.add_column("")
        best = (result.best or {}).get("step")
        for one in result.evaluations:
            values = [f"{one.metrics[name]:.4f}" if name in one.metrics else "-" for name in names]
            mark = "best" if one.step == best else "as it came" if one.step == 0 else one.error or ""
            table.add_row(str(one.step), *values, mark, style="bold green" if one.step == best else None)
        self.console.print(table)


def describe(event: Mapping[str, Any]) -> str:
    """An event as one line with its values."""
    values = {name: value for name, value in event.items() if name not in ("kind", "time") and value is not None}
    if isinstance(values.get("metrics"), Mapping):
        values |= values.pop("metrics")
    shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
    return f"{event['kind']}: {', '.join(shown)}"
