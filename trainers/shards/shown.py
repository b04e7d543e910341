"""One row as the model gets it, for people: each token with its text and whether it is a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from trainers.records import Array, Record
from trainers.shards.dataset import ShardSet
from trainers.tasks.base import EncodeRules, Example, Task
from trainers.tasks.encoded import encode_rows
from trainers.tokenizer.encoder import Encoder

VALUES = ("label", "several", "tags", "score")
"""What a sequence holds beside its tokens that people want to see."""


class ShownToken(Record):
    """One token of a sequence."""

    id: int
    text: str
    target: bool
    """Whether the loss asks for it."""
    begins: bool = False
    """Whether it is the first of a sequence: a row that is split has several, and none sees another."""


class ShownRow(Record):
    """What became of one row."""

    row: int
    """Its place in the split, from 0."""
    file: str
    position: int
    """Byte offset of its line for jsonl and text, row number for the others."""
    outcome: str
    tokens: tuple[ShownToken, ...]
    tokens_lost: int
    cut: str
    """The text of the tokens that were cut off its end, where it is there that they were cut."""
    values: Mapping[str, Any]
    """What a sequence holds beside its tokens: a label, tags, a score."""
    packs: tuple[int, ...] = ()
    """The packs of an epoch that it stands in, where the job packs and its shards are written."""


class ShownSequence(Record):
    """One sequence of the shards."""

    file: str
    position: int
    """As the ledger names the row it came from."""
    part: int
    """Its place among the sequences of that row."""
    tokens: tuple[ShownToken, ...]
    values: Mapping[str, Any]


def show_rows(
    rows: Sequence[tuple[int, str, int, Mapping[str, Any] | None]], task: Task, encoder: Encoder, rules: EncodeRules
) -> list[ShownRow]:
    """Encode rows, each (place, file, position, fields), and spell them out."""
    shown = []
    for number, file, position, fields in rows:
        settled = ["dropped:malformed" if fields is None else None]
        batch = encode_rows(task, [fields or {}], encoder, rules, settled)
        examples = [
            Example(number, batch.tokens[index], {name: column[index].as_py() for name, column in batch.extra.items()})
            for index in range(len(batch.tokens))
        ]
        outcome, lost = batch.outcomes[batch.codes[0]], int(batch.tokens_lost[0])
        tokens = [token for example in examples for token in _tokens(task, example, encoder)]
        cut = _cut(fields or {}, task, encoder, rules, examples[0].input_ids) if lost and examples else ""
        shown.append(
            ShownRow(
                row=number,
                file=file,
                position=position,
                outcome=outcome,
                tokens=tuple(tokens),
                tokens_lost=lost,
                cut=cut,
                values=_values(examples[0]) if examples else {},
            )
        )
    return shown


def show_sequence(held: ShardSet, index: int, task: Task, encoder: Encoder) -> ShownSequence:
    """A sequence of the shards by its place. Raises IndexError."""
    example, (file, position, part) = held.row(index), held.origin(index)
    tokens = tuple(_tokens(task, example, encoder))
    return ShownSequence(file=file, position=position, part=part, tokens=tokens, values=_values(example))


def stretches(tokens: Sequence[ShownToken]) -> Iterator[tuple[str, bool]]:
    """The text of tokens in stretches: (text, whether they are targets)."""
    for target, some in groupby(tokens, key=lambda token: token.target):
        yield "".join(token.text for token in some), target


def _values(example: Example) -> dict[str, Any]:
    return {name: example.extra[name] for name in VALUES if example.extra.get(name) is not None}


def _tokens(task: Task, example: Example, encoder: Encoder) -> list[ShownToken]:
    ids, targets = task.target_tokens(example)
    before = [None, *ids[:-1].tolist()]
    return [
        ShownToken(id=int(number), text=_text(encoder, int(number), last), target=bool(target), begins=place == 0)
        for place, (number, target, last) in enumerate(zip(ids, targets, before, strict=True))
    ]


def _text(encoder: Encoder, number: int, before: int | None) -> str:
    """A token's text behind the one before it: only together do they tell whether a blank stands between."""

    def decode(*numbers: int) -> str:
        return str(encoder.tokenizer.decode(list(numbers), clean_up_tokenization_spaces=False))

    if before is not None and (both := decode(before, number)).startswith(first := decode(before)):
        return both[len(first) :]
    return decode(number)


def _cut(fields: Mapping[str, Any], task: Task, encoder: Encoder, rules: EncodeRules, kept: Array) -> str:
    whole = encode_rows(task, [fields], encoder, replace(rules, max_length=2**30)).tokens
    if not len(whole) or not np.array_equal(whole[0][: len(kept)], kept):
        return ""
    return str(encoder.tokenizer.decode(whole[0][len(kept) :].tolist(), clean_up_tokenization_spaces=False))
