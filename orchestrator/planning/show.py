"""`tuneyard show`: rows of a job as the model gets them, read from the data itself, so that no shards are needed."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.planning.packs import Packs, ShownPack, open_packs
from trainers.errors import DataError, JobError
from trainers.job.schema import Job
from trainers.model.source import ModelFolder, prepare_model
from trainers.shards.keys import SplitName, SplitPlan, Splits, plan_splits
from trainers.shards.ledger import matches
from trainers.shards.shown import ShownRow, ShownToken, show_rows, stretches
from trainers.sources.place import place_of
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.tasks import EncodeRules, Task, encode_rules, load_task
from trainers.tokenizer.encoder import Encoder, load_encoder

SHOWN = 5
"""Rows of one outcome that are shown."""
BATCH = 256
SHORT, STRETCH = 300, 120
"""Characters of a row, and of a stretch of it, that `in_short` shows."""
TARGET = "bold green"
MARKS = "⟦", "⟧"
"""Around targets, where there is no colour."""
BORDER = "┃"
"""Before the first token of a sequence: in a pack it sees nothing that stands before it."""
RawRow = tuple[int, str, int, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Viewer:
    """A job's rows and what they are shown with."""

    job: Job
    model: ModelFolder
    splits: Splits
    task: Task
    encoder: Encoder
    rules: EncodeRules

    def rows(self, name: SplitName) -> Iterator[RawRow]:
        """All rows of a split, in order: (place, file, position, fields)."""
        split: SplitPlan = next(plan for plan in self.splits if plan.name == name)
        raw = ((unit.file, *row) for unit in plan_units(split.sources)
               for row in read_unit(unit, split.sources[unit.file], task_columns(self.job)))  # fmt: skip
        held = (one for one in raw if split.holds(one[0], one[1]))
        for place, (file, position, fields) in enumerate(held):
            yield place, split.sources[file].uri, position, fields

    def show(self, rows: Sequence[RawRow]) -> list[ShownRow]:
        return show_rows(rows, self.task, self.encoder, self.rules)

    def packs(self) -> Packs:
        """Raises JobError and DataError as `open_packs` does."""
        return open_packs(self.job, self.model, self.splits, self.encoder)


def view(job: Job, model: ModelFolder | None = None, splits: Splits | None = None) -> Viewer:
    """Everything that is needed to show rows of a job; model and splits where the caller has them."""
    model = model or prepare_model(job)
    encoder, rules = load_encoder(model.path, job.model.trust_remote_code), encode_rules(job)
    task = load_task(job.task, rules.options)
    task.prepare(encoder)
    return Viewer(job, model, splits or plan_splits(job, model.path), task, encoder, rules)


def examples(
    job: Job, split: SplitName = "train", row: int | None = None, number: int | None = None, reason: str | None = None
) -> list[ShownRow]:
    """The rows that are asked for; the first row where nothing is.

    Args:
        row: that row of the split, from 0.
        number: so many rows, drawn by the job's seed.
        reason: the first rows with this outcome, as the ledger names it.

    Raises:
        JobError: where there is no such row.
    """
    viewer = view(job)
    rows = viewer.rows(split)
    if reason is not None:
        shown = _of_outcome(rows, reason, viewer.show)
        if not shown:
            raise JobError(f"--reason {reason}: no row of data.{split} has that outcome; `tuneyard ledger` lists them")
    else:
        chosen = _drawn(rows, number, job.train.seed) if number else list(islice(rows, row or 0, (row or 0) + 1))
        if not chosen:
            raise JobError(f"--row {row or 0}: data.{split} has no such row; rows count from 0")
        shown = viewer.show(chosen)
    with suppress(JobError, DataError):  # not packed, or not written yet
        packs = viewer.packs() if split == "train" else None
        shown = [packs.place(one) for one in shown] if packs else shown
    return shown


def first_example(viewer: Viewer) -> ShownRow | None:
    """The first training row that becomes a sequence, if one of the first does."""
    shown = (viewer.show([row])[0] for row in islice(viewer.rows("train"), BATCH))
    return next((one for one in shown if one.tokens), None)


def _drawn(rows: Iterable[RawRow], number: int, seed: int) -> list[RawRow]:
    """A sample of rows, each as likely, in one pass."""
    draw = random.Random(seed)
    kept: list[RawRow] = []
    for count, row in enumerate(rows, 1):
        if len(kept) < number:
            kept.append(row)
        elif (place := draw.randrange(count)) < number:
            kept[place] = row
    return sorted(kept, key=lambda row: row[0])


def _of_outcome(rows: Iterator[RawRow], reason: str, show: Callable[[list[RawRow]], list[ShownRow]]) -> list[ShownRow]:
    found: list[ShownRow] = []
    while len(found) < SHOWN and (some := list(islice(rows, BATCH))):
        found += [shown for shown in show(some) if matches(shown.outcome, reason)]
    return found[:SHOWN]


def print_examples(rows: Sequence[ShownRow]) -> None:
    """Rows with their targets in colour, or in marks where the terminal has none."""
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    for row in rows:
        console.print(
            f"row {row.row} ({place_of(row.file, row.position)}): {row.outcome}, {_counts(row.tokens)}, "
            f"{row.tokens_lost:,} tokens cut off",
            style="bold",
        )
        _print_sequence(console, row.values, row.tokens)
        if row.cut:
            console.print(Text(f"cut off: {row.cut}", style="dim strike" if console.color_system else ""))
        for pack in row.packs:
            console.print(f"in pack {pack}: `--pack {pack}` shows it whole")


def print_pack(pack: ShownPack) -> None:
    """The documents of a pack, each behind its border."""
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    tokens = [token for document in pack.documents for token in document.tokens]
    console.print(f"pack {pack.pack}: {len(pack.documents):,} documents, {_counts(tokens)}", style="bold")
    for document in pack.documents:
        console.print(
            f"{place_of(document.file, document.position)}: {_counts(document.tokens)}", style="dim", markup=False
        )
        _print_sequence(console, document.values, document.tokens)


def _counts(tokens: Sequence[ShownToken]) -> str:
    return f"{len(tokens):,} tokens, {sum(token.target for token in tokens):,} targets"


def _print_sequence(console: Console, values: Mapping[str, Any], tokens: Sequence[ShownToken]) -> None:
    for name, value in values.items():
        console.print(f"{name}: {value}", markup=False)
    if tokens:
        console.print(spelled(tokens, console.color_system is not None))


def in_short(row: ShownRow) -> str:
    """A row in a few lines, without colour: long stretches lose their middle, and what comes late is left out."""
    parts = [f"{name}: {value}; " for name, value in row.values.items()]
    for text, target in stretches(row.tokens):
        piece = text.replace("\n", "↵")
        if len(piece) > STRETCH:
            piece = f"{piece[: STRETCH // 2]} … {piece[-STRETCH // 2 :]}"
        parts.append(f"{MARKS[0]}{piece}{MARKS[1]}" if target else piece)
        if sum(map(len, parts)) > SHORT:
            return "".join([*parts, " …"])
    return "".join(parts)


def spelled(tokens: Sequence[ShownToken], colour: bool) -> Text:
    """The text of tokens; sequences begin with a border."""
    text, inside = Text(), False
    for token in tokens:
        if not colour and inside and (not token.target or token.begins):
            text.append(MARKS[1])
            inside = False
        if token.begins:
            text.append(BORDER, style="dim")
        if not colour and token.target and not inside:
            text.append(MARKS[0])
            inside = True
        text.append(token.text, style=TARGET if token.target and colour else "")
    if inside:
        text.append(MARKS[1])
    return text
