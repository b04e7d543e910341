"""What the user sees of a run: progress bars on a terminal, lines with values elsewhere, a table at the end."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from orchestrator.sharding.stage import ShardProgress
from orchestrator.terminal.table import show_evaluations
from trainers.run.describe import describe, duration
from trainers.run.events import (
    CheckpointEvent,
    EvaluationEvent,
    Event,
    RestartEvent,
    RolledBackEvent,
    StartEvent,
    StepEvent,
    StragglerEvent,
    VerificationEvent,
)
from trainers.run.folder import RegisteredVersion, RunResult
from trainers.storage import Folder

MINUTE_S = 60.0
"""Off a terminal a stage prints a line as often, with the clock; and when it has ended."""


def whole() -> Column:
    """A column that is never cut: where room is short the bar gives way."""
    return Column(no_wrap=True)


class Screen:
    """Standard output of one command."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, emoji=False)
        self.metric = ""
        """The one that decides; it is told first."""
        columns = (SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(bar_width=24),
                   MofNCompleteColumn(table_column=whole()), TimeRemainingColumn(compact=True, table_column=whole()),
                   TextColumn("{task.fields[note]}"))  # fmt: skip
        self._progress = Progress(*columns, console=self.console)
        self._waiting = Progress(SpinnerColumn(), TextColumn("{task.description}"), console=self.console)
        """Apart from the bars, whose columns it would widen until they leave no room for their values."""
        self._bars: dict[str, TaskID] = {}
        self._wait: TaskID | None = None
        self._said_at: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._straggler: int | None = None

    @contextmanager
    def live(self) -> Iterator["Screen"]:
        """Show bars for the length of the block, where there is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(Group(self._progress, self._waiting), console=self.console):
            yield self

    def advance(self, stage: str, done: int, total: int, note: str = "") -> None:
        """A stage has come this far."""
        self._wait_ends()
        if self.console.is_terminal:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=total, note=note)
            self._progress.update(self._bars[stage], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        began, first = self._began.setdefault(stage, (now, done))
        if now - self._said_at.get(stage, -math.inf) < MINUTE_S and done != total:
            return
        self._said_at[stage] = now
        pace = (now - began) / (done - first) if done > first else 0.0
        time_left = f", {duration(pace * (total - done))} left" if pace and done < total else ""
        said = f"{time.strftime('%H:%M:%S')} {stage}: {done:,}/{total:,}{time_left}"
        self.say(f"{said}, {note}" if note else said)

    def wait(self, what: str) -> None:
        """Say what is waited for; on a terminal something moves until the next progress or event."""
        self._wait_ends()
        if self.console.is_terminal:
            self._wait = self._waiting.add_task(what, total=None)
        else:
            self.say(f"{time.strftime('%H:%M:%S')} {what}")

    def _wait_ends(self) -> None:
        if self._wait is not None:
            self._waiting.remove_task(self._wait)
            self._wait = None

    def say(self, line: str) -> None:
        """One line of text; on a terminal wrapped between words, unless it holds a path, which is copied."""
        soft = not self.console.is_terminal or "/" in line
        self.console.print(line, highlight=False, markup=False, soft_wrap=soft)

    def on_shards(self, progress: ShardProgress) -> None:
        """A bar a split."""
        note = f"{progress.rows:,} rows, {progress.tokens:,} tokens"
        self.advance(f"{progress.split} data", progress.units_done, progress.units_total, note)

    def on_event(self, event: Event, steps: int) -> None:
        """Show an event of the run's log; between the bars of a terminal, what does not come regularly."""
        if isinstance(event, StepEvent):
            self.advance("train", event.step, steps, f"loss {event.loss:.4f}, {event.tokens_per_s or 0:,.0f} tokens/s")
        elif self._is_news(event) and (line := describe(event, self.metric)):
            self._wait_ends()
            self.say(line)
        if isinstance(event, RestartEvent | RolledBackEvent | VerificationEvent):
            self.wait("loading the model")

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
        self._wait_ends()
        chosen, metric = step if isinstance(step, int) else None, str(best.get("metric", ""))
        show_evaluations(result.evaluations, metric, chosen, self.console, result.baselines)
        self.registered(result.registry)
        self.say(f"report  {run}/report.html")
        self.say(f"curves  tensorboard --logdir {run}/tensorboard")

    def registered(self, version: RegisteredVersion | None) -> None:
        """The registered version, and its folder."""
        if version:
            self.say(
                f"model   {version.model} version {version.version}{f' ({version.alias})' if version.alias else ''}"
            )
            self.say(f"folder  {version.source}")
