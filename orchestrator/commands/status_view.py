"""`tuneyard status` for people: a block of lines a run on a terminal, tab-separated lines in a pipe."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.commands.status import RunStatus
from trainers.run.describe import duration

STYLES = {"running": "bold cyan", "done": "green", "trained": "green", "failed": "bold red"}
FOLLOW_S = 2.0
CAUSE_CHARS = 300


def block(status: RunStatus) -> list[str]:
    """One run in a few short lines; the first is its name and state."""
    lines = [f"{status.run}  {status.state}"]
    if status.error:
        lines.append(status.error.splitlines()[0])
    done = f"step {status.step:,}" + (f" of {status.steps:,}" if status.steps else "")
    facts = [
        done,
        status.doing,
        status.left_s is not None and f"{duration(status.left_s)} left",
        status.loss is not None and f"loss {status.loss:.4f}",
        status.tokens_per_s is not None and f"{status.tokens_per_s:,.0f} tokens/s",
    ]
    lines.append(", ".join(fact for fact in facts if fact))
    best = f"best {status.metric} {status.best_value:.4f} at step {status.best_step:,}" if status.best_step else ""
    newest = f"newest checkpoint: step {status.last_checkpoint:,}" if status.last_checkpoint is not None else ""
    lines += [", ".join(filter(None, (best, newest)))] if best or newest else []
    lines += [f"registered as {status.registered}"] if status.registered else []
    if status.event_age_s is not None:
        lines.append(f"last event {duration(status.event_age_s)} ago")
    if status.last_restart and status.last_restart_age_s is not None:
        count = f"{status.restarts} restart{'s' * (status.restarts > 1)}"
        cause = status.last_restart.splitlines()[0][:CAUSE_CHARS]
        lines.append(f"{count}, the last {duration(status.last_restart_age_s)} ago: {cause}")
    lines += [f"logs {status.logs}"] if status.logs else []
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def plain(found: Sequence[RunStatus]) -> str:
    """A line a run, tab-separated, under a line of names; empty where there is no value."""
    names = list(RunStatus.model_fields)
    rows = [[getattr(status, name) for name in names] for status in found]
    lines = [names, *(["" if value is None else " ".join(str(value).split()) for value in row] for row in rows)]
    return "\n".join("\t".join(line) for line in lines)


def show_status(ask: Callable[[], Sequence[RunStatus]], follow: bool, console: Console | None = None) -> None:
    """Print the state of runs; with `follow` again and again, until none of them runs."""
    console = console or Console(emoji=False)
    if not console.is_terminal:
        shown: object = None
        while True:
            statuses = ask()
            if (news := [(status.run, status.state, status.step) for status in statuses]) != shown:
                shown = news
                print(plain(statuses) if statuses else "no runs yet", flush=True)
            if not follow or not any(status.state == "running" for status in statuses):
                return
            time.sleep(FOLLOW_S)
    if not follow:
        console.print(_page(ask()), end="")
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            statuses = ask()
            live.update(_page(statuses), refresh=True)
            if not any(status.state == "running" for status in statuses):
                return
            time.sleep(FOLLOW_S)


def _page(statuses: Sequence[RunStatus]) -> Text:
    page = Text()
    for status in statuses:
        first, *others = block(status)
        page.append(first + "\n", STYLES.get(status.state, "yellow"))
        page.append("\n".join(others) + "\n")
    return page if statuses else Text("no runs yet\n")
