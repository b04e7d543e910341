"""What the user sees of a run: progress bars on a terminal, lines with values elsewhere, a table at the end."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.sharding.stage import ShardProgress
from orchestrator.terminal.table import show_evaluations
from trainers.run.describe import describe
from trainers.run.events import CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent, StragglerEvent
from trainers.run.folder import RunResult
from trainers.storage import Folder

LINES_PER_STAGE = 20
"""Off a terminal, a stage prints about this many lines, however long it is."""


class Screen:
    """Standard output of one command."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=32), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self._progress = Progress(*columns, console=self.console)
        self._bars: dict[str, TaskID] = {}
        self._ticks: dict[str, int] = {}
        self._straggler: int | None = None

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
        if tick != self._ticks.get(stage) or done == total:
            self._ticks[stage] = tick
            self.say(f"{stage}: {done}/{total} {note}".rstrip())

    def say(self, line: str) -> None:
        """One line of text."""
        self.console.print(line, highlight=False, markup=False)

    def on_shards(self, progress: ShardProgress) -> None:
        """A bar a split."""
        note = f"{progress.rows:,} rows, {progress.tokens:,} tokens"
        self.advance(f"{progress.split} data", progress.units_done, progress.units_total, note)

    def on_event(self, event: Event, steps: int) -> None:
        """Show an event of the run's log; between the bars of a terminal, what does not come regularly."""
        if isinstance(event, StepEvent):
            self.advance("train", event.step, steps, f"loss {event.loss:.4f}  {event.tokens_per_s or 0:,.0f} tokens/s")
        elif self._is_news(event) and (line := describe(event)):
            self.say(line)

    def _is_news(self, event: Event) -> bool:
        """A straggler is told of once, though each step names it again."""
        if isinstance(event, StragglerEvent):
            known, self._straggler = self._straggler, event.rank
            return event.rank != known
        if isinstance(event, StartEvent):
            self._straggler = None
        return not (self.console.is_terminal and isinstance(event, CheckpointEvent | EvaluationEvent))

    def results(self, run: Folder, result: RunResult) -> None:
        """The final table (every metric by step, the best marked), the registered version and where to look."""
        best = result.best or {}
        step = best.get("step")
        show_evaluations(
            result.evaluations, str(best.get("metric", "")), step if isinstance(step, int) else None, self.console
        )
        if result.registry:
            alias = f" ({result.registry.alias})" if result.registry.alias else ""
            self.say(f"model   {result.registry.model} version {result.registry.version}{alias}")
            self.say(f"folder  {result.registry.source}")
        self.say(f"report  {run}/report.html")
        self.say(f"curves  tensorboard --logdir {run}/tensorboard")
