"""A small data set for each task, so that a template runs as `tuneyard init` writes it. Made up; replace it by yours.

Rows are combinations of a few words, in an order that a hash fixes; they show the form of a task's rows, and are simple
enough that a model of any size learns them in a few steps.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

Row = dict[str, Any]

ROWS = {"train": 80, "dev": 20}
NAMES = ("Ada", "Grace", "Alan", "Katherine", "Dennis")
CITIES = ("Paris", "Nairobi", "Lima", "Oslo", "Kyoto")
ANIMALS = ("dog", "cat", "horse", "goat", "sheep")
DOINGS = ("sleeps", "runs", "eats", "waits", "jumps")
GERMAN = {"dog": "Der Hund", "cat": "Die Katze", "horse": "Das Pferd", "goat": "Die Ziege", "sheep": "Das Schaf",
          "sleeps": "schläft", "runs": "rennt", "eats": "frisst", "waits": "wartet", "jumps": "springt",
          "today": "heute", "here": "hier", "now": "jetzt", "again": "wieder"}  # fmt: skip
WHEN = ("today", "here", "now", "again")


def sample_rows(task: str) -> dict[str, list[Row]]:
    """Rows of a task by split."""
    rows = sorted(MAKERS[task](), key=lambda row: hashlib.sha256(repr(row).encode()).digest())
    return {"train": rows[: ROWS["train"]], "dev": rows[ROWS["train"] : sum(ROWS.values())]}


def _reviews() -> Iterator[Row]:
    words = {"positive": ("a wonderful", "a charming", "a clever"), "negative": ("a dull", "a clumsy", "a tired")}
    parts = product(words.items(), ("film", "book", "play", "song"), ("from start to end", "in every way", "all told",
                    "and much too long", "for everybody"))  # fmt: skip
    for (label, openings), thing, ending in parts:
        yield from ({"text": f"{opening} {thing} {ending}", "label": label} for opening in openings)


def _places() -> Iterator[Row]:
    for name, verb, city, when in product(NAMES, ("visited", "left"), CITIES, WHEN[:2]):
        yield {"tokens": [name, verb, city, when], "tags": ["B-PER", "O", "B-LOC", "O"]}


def _questions() -> Iterator[Row]:
    for name, city, verb, when in product(NAMES, CITIES, ("works", "lives"), WHEN[:2]):
        context = f"It is well known that {name} {verb} in {city} {when}."
        answers = {"text": [city], "answer_start": [context.index(city)]}
        yield {"question": f"Where is it that {name} {verb}?", "context": context, "answers": answers}


def _pairs() -> Iterator[Row]:
    for (first, doing), (second, other) in product(product(ANIMALS, DOINGS[:3]), product(ANIMALS[:3], DOINGS[:3])):
        score = 2.5 * (first == second) + 2.5 * (doing == other)
        yield {"sentence1": f"The {first} {doing}.", "sentence2": f"A {second} {other}.", "score": score}


def _translations() -> Iterator[Row]:
    for animal, doing, when in product(ANIMALS, DOINGS, WHEN):
        german = f"{GERMAN[animal]} {GERMAN[doing]} {GERMAN[when]}."
        yield {"en": f"The {animal} {doing} {when}.", "de": german}


def _conversations() -> Iterator[Row]:
    for animal, doing, when in product(ANIMALS, DOINGS, WHEN):
        yield {"messages": [{"role": "user", "content": f"What does the {animal} do {when}?"},
                            {"role": "assistant", "content": f"The {animal} {doing} {when}."}]}  # fmt: skip


def _texts() -> Iterator[Row]:
    for name, city, animal, doing in product(NAMES[:4], CITIES, ANIMALS, DOINGS[:2]):
        yield {"text": f"{name} came to {city} with a {animal}. While {name} reads, the {animal} {doing}."}


MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    "classify": _reviews,
    "tag": _places,
    "extract": _questions,
    "similarity": _pairs,
    "seq2seq": _translations,
    "sft": _conversations,
    "pretrain": _texts,
    "mlm": _texts,
}
