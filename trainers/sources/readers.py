"""Reading a split: a plan of units that depends on the files alone, and the rows of one unit.

A unit is the least work that is done, or done again after a kill, as a whole: it becomes one shard. Which files those
are is decided in `sources`, how their bytes become rows in `formats`. Begin at `plan_units`.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from trainers.errors import DataError, JobError
from trainers.job.schema import TASK_FIELDS, Job
from trainers.job.task_fields import PLACE
from trainers.sources.files import SourceFile
from trainers.sources.formats import FORMATS, RawRow, Span
from trainers.sources.text_values import TEXT_VALUES, read_decimal

UNIT_BYTES = 8 * 2**20
"""Source bytes a unit aims at: about two million tokens, a tenth of a second of the quickest tokenizer."""
MOST_UNITS = 16_384
"""Past 128 GiB of sources units are larger, so that a split has about so many shards, and its manifest stays small."""
NEEDED_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("conversations",), ("instruction", "output"))
}
"""Tasks that take any one of several sets of fields; the others need their required fields."""
OTHER_KINDS = (
    (("chosen", "rejected"), "these are preference pairs, of which no task here learns"),
    (("chosen_messages", "rejected_messages"), "these are preference pairs, of which no task here learns"),
    (("segments",), "these are segments that are to be trained without a chat template"),
    (("input_ids",), "these are token ids, and tasks here take texts"),
    (("completions", "labels"), "these are steps with a verdict each, of which no task here learns"),
)
"""Columns that tell what a file is which lacks those of the task."""
CHAT_NAMES = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "messages_list"),
    "instruction": ("question", "query", "prompt", "message_1", "instructions", "problem", "unanswerable_question"),
    "output": ("response", "answer", "completion", "generation", "message_2", "solution", "summary", "outputs"),
    "input": ("context", "article", "passage", "inputs"),
    "system": ("system_prompt", "system_message"),
    "reasoning": ("cot", "chain_of_thought", "rationale", "thought", "complex_cot"),
}
"""sft: names that public data have for its fields, in small letters; only proposed, since a name tells no more."""


@dataclass(frozen=True)
class Unit:
    """One part of one file."""

    index: int
    """Its place among the units of the split, which is also its shard's number."""
    file: int
    """The file, as an index into the split's sources."""
    span: Span


def plan_units(sources: Sequence[SourceFile], unit_bytes: int | None = None) -> tuple[Unit, ...]:
    """Cut files into units, in order: of about `unit_bytes`, by default UNIT_BYTES or what makes MOST_UNITS of them.

    The number of workers does not count.
    """
    if unit_bytes is None:
        unit_bytes = max(UNIT_BYTES, sum(source.size for source in sources) // MOST_UNITS)
    spans = [
        (file, span) for file, source in enumerate(sources) for span in FORMATS[source.format].plan(source, unit_bytes)
    ]
    return tuple(Unit(index, file, span) for index, (file, span) in enumerate(spans))


def read_unit(unit: Unit, source: SourceFile, columns: Mapping[str, str]) -> Iterator[RawRow]:
    """The rows of a unit, in order, as the task's fields.

    Args:
        unit: what to read.
        source: its file.
        columns: for each field of the task, the data's column; a column that a row lacks leaves its field out. With
            dots, what stands in a structure: translation.en.

    Yields:
        (row, fields): `row` is the byte offset of the line for jsonl and text, the row number from 0 for the others;
        `fields` is None where the row is malformed.

    Raises:
        DataError: where the file is damaged beyond a single row.
    """
    convert = {field: TEXT_VALUES[field] for field in columns if field in TEXT_VALUES}
    if source.format not in ("csv", "tsv"):
        convert.pop("label", None)
    wanted = list(dict.fromkeys(name for column in columns.values() for name in (column, column.split(".")[0])))
    dotted = dotted_columns(columns)
    try:
        for row, record in FORMATS[source.format].read(source, unit.span, wanted):
            if record is None:
                yield row, None
                continue
            fields = pick_fields(record, columns, dotted)
            for field, parse in convert.items():
                if isinstance(value := fields.get(field), str):
                    fields[field] = parse(value)
            yield row, fields
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(
            f"{source.uri}: the file is damaged or cannot be read to its end ({error}). "
            "Fetch or write it again, or leave it out"
        ) from error


def dotted_columns(columns: Mapping[str, str]) -> dict[str, list[str]]:
    """By field: the names, one in another, of a column with dots."""
    return {field: column.split(".") for field, column in columns.items() if "." in column}


def pick_fields(
    record: Mapping[str, Any], columns: Mapping[str, str], dotted: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The task's fields of a row. A column that it lacks leaves its field out.

    Args:
        record: the row, by column.
        columns: for each field, its column.
        dotted: `dotted_columns` of them.
    """
    fields = {field: record[column] for field, column in columns.items() if column in record}
    for field, names in dotted.items():
        if field not in fields and names[0] in record:
            fields[field] = _inside(record, names)
    for field, value in fields.items():
        if isinstance(value, Decimal):
            fields[field] = read_decimal(value)
    return fields


def _inside(value: Any, names: Sequence[str]) -> Any:
    """What stands under names, one in another; None where something is missing on the way."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def task_columns(job: Job) -> dict[str, str]:
    required, optional = TASK_FIELDS[job.task]
    return {field: job.column(field) for field in (*required, *optional)}


def check_columns(
    sources: Sequence[SourceFile], columns: Mapping[str, str], needed: Sequence[Sequence[str]], where: str
) -> None:
    """Look at the start of each file: is it what its name says, and has it the columns that the task reads?

    Args:
        sources: the files of a split.
        columns: for each field of the task, the data's column. One that is mapped to another name must exist.
        needed: sets of fields, any one of which is enough.
        where: the key of the job file that the files come from, for messages.

    Raises:
        DataError: for files that are not what they are said to be, all of them at once.
        JobError: for columns that are missing, all files at once.
    """
    refused: list[str] = []
    problems: list[str] = []
    for source in sources:
        try:
            present = _peek(source)
        except DataError as error:
            refused.append(str(error))
            continue
        if present is not None and (problem := _missing(present, columns, needed)):
            bare = source.format in ("csv", "tsv") and set(present).isdisjoint(columns.values())
            header = ". Where the first line is no header, write one that names the columns" if bare else ""
            problems.append(f"{source.uri}: {problem}{header}")
    if refused:
        raise DataError(refused[0] if len(refused) == 1 else "\n  - ".join([f"{len(refused)} files", *refused]))
    if problems:
        raise JobError(problems, where)


def needed_fields(task: str, prompt: str | None = None) -> tuple[tuple[str, ...], ...]:
    """Sets of fields of a task, any one of which a file must have; what `data.prompt` holds is needed too."""
    sets = NEEDED_FIELDS.get(task, (TASK_FIELDS[task][0],))
    return tuple(tuple(dict.fromkeys((*fields, *PLACE.findall(prompt or "")))) for fields in sets)


def _peek(source: SourceFile) -> tuple[str, ...] | None:
    try:
        return FORMATS[source.format].peek(source)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(
            f"{source.uri}: cannot be read as {source.format} ({error}). Fetch or write it again"
        ) from error


def _missing(present: Sequence[str], columns: Mapping[str, str], needed: Sequence[Sequence[str]]) -> str | None:
    """What a file lacks, with the nearest column it has; None where nothing."""

    def lacking(fields: Sequence[str]) -> list[str]:
        return [field for field in fields if not {columns[field], columns[field].split(".")[0]} & set(present)]

    named = [field for field, column in columns.items() if field != column]
    fullest = min(needed, key=lambda fields: len(lacking(fields)) / len(fields) - len(set(fields) & set(named)))
    absent = lacking(list(dict.fromkeys([*fullest, *named])))
    if not absent:
        return None
    if kind := next((kind for names, kind in OTHER_KINDS if set(names) <= set(present)), None):
        return f"{kind}; columns here: {', '.join(present)}"
    if "messages" in columns and not named and (advice := _chat_advice(present)):
        return advice
    wanted = ", ".join(repr(columns[field]) for field in absent)
    others = [" and ".join(repr(columns[field]) for field in fields) for fields in needed if fields is not fullest]
    instead = f" (nor {', nor '.join(others)})" if others else ""
    free = [name for name in present if name not in columns.values()]
    near = {field: difflib.get_close_matches(columns[field], free, n=1, cutoff=0.5) for field in absent}
    last = free[0] if len(free) == len(absent) == 1 else "YOUR_COLUMN"
    example = ", ".join(f"{field}: {near[field][0] if near[field] else last}" for field in absent)
    return (
        f"no column {wanted}{instead}; columns here: {', '.join(present) or 'none'}. "
        f"Say which column holds the field: data.columns: {{{example}}}"
    )


def _chat_advice(present: Sequence[str]) -> str | None:
    """For sft: which of the columns are a conversation by their names, or what task the rows are for."""
    small = {name.lower(): name for name in reversed(present)}
    names = {field: next((small[name] for name in (field, *others) if name in small), None)
             for field, others in CHAT_NAMES.items()}  # fmt: skip
    found = {field: name for field, name in names.items() if name}
    keep = ("messages", "system") if "messages" in found else ("instruction", "input", "output", "system", "reasoning")
    pairs = {field: found[field] for field in keep if field in found}
    here = f"columns here: {', '.join(present)}"
    if "messages" in pairs or {"instruction", "output"} <= pairs.keys():
        named = ", ".join(f"{field}: {column}" for field, column in pairs.items() if field != column)
        return (
            f"no column of a conversation is named as sft has it; {here}. Say which they are: data.columns: {{{named}}}"
        )
    if "text" in small:
        return f"these are plain texts, of which task: pretrain learns (sft takes conversations); {here}"
    return None
