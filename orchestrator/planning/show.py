"""`tuneyard show`: rows of a job as the model gets them, read from the data itself, so that no shards are needed."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.source import prepare_model
from trainers.shards.keys import split_sources
from trainers.shards.ledger import matches
from trainers.shards.shown import ShownRow, ShownToken, show_rows
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.tasks import encode_rules, load_task
from trainers.tokenizer.encoder import load_encoder

SHOWN = 5
"""Rows of one outcome that are shown."""
BATCH = 256
TARGET = "bold green"
MARKS = "⟦", "⟧"
"""Around targets, where there is no colour."""
BORDER = "┃"
"""Before the first token of a sequence: in a pack it sees nothing that stands before it."""
RawRow = tuple[int, str, int, Mapping[str, Any] | None]


def examples(
    job: Job,
    split: Literal["train", "eval"] = "train",
    row: int | None = None,
    number: int | None = None,
    reason: str | None = None,
) -> list[ShownRow]:
    """The rows that are asked for; the first row where nothing is.

    Args:
        row: that row of the split, from 0.
        number: so many rows, drawn by the job's seed.
        reason: the first rows with this outcome, as the ledger names it.

    Raises:
        JobError: where there is no such row.
    """
    encoder = load_encoder(prepare_model(job).path, job.model.trust_remote_code)
    rules = encode_rules(job)
    task = load_task(job.task, rules.options)
    task.prepare(encoder)
    rows = read_rows(job, split)
    if reason is not None:
        found = _of_outcome(rows, reason, lambda some: show_rows(some, task, encoder, rules))
        if not found:
            raise JobError(f"--reason {reason}: no row of data.{split} has that outcome; `tuneyard ledger` lists them")
        return found
    chosen = _drawn(rows, number, job.train.seed) if number else list(islice(rows, row or 0, (row or 0) + 1))
    if not chosen:
        raise JobError(f"--row {row or 0}: data.{split} has no such row; rows count from 0")
    return show_rows(chosen, task, encoder, rules)


def read_rows(job: Job, split: Literal["train", "eval"]) -> Iterator[RawRow]:
    """All rows of a split's files, in order: (place, file, position, fields)."""
    sources = split_sources(job)
    files = sources.get(split) or sources["train"]
    place = 0
    for unit in plan_units(files):
        for position, fields in read_unit(unit, files[unit.file], task_columns(job)):
            yield place, files[unit.file].uri, position, fields
            place += 1


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


def _of_outcome(rows: Iterator[RawRow], reason: str, encode: Any) -> list[ShownRow]:
    found: list[ShownRow] = []
    while len(found) < SHOWN and (some := list(islice(rows, BATCH))):
        found += [shown for shown in encode(some) if matches(shown.outcome, reason)]
    return found[:SHOWN]


def print_examples(rows: Sequence[ShownRow]) -> None:
    """Rows with their targets in colour, or in marks where the terminal has none."""
    console = Console(soft_wrap=True, highlight=False)
    for row in rows:
        targets = sum(token.target for token in row.tokens)
        console.print(
            f"row {row.row} ({row.file}, {row.position}): {row.outcome}, {len(row.tokens):,} tokens, "
            f"{targets:,} targets, {row.tokens_lost:,} tokens cut off",
            style="bold",
        )
        for name, value in row.values.items():
            console.print(f"{name}: {value}", markup=False)
        if row.tokens:
            console.print(spelled(row.tokens, console.color_system is not None))
        if row.cut:
            console.print(Text(f"cut off: {row.cut}", style="dim strike" if console.color_system else ""))


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
