"""The quickstart's data: the English conversations of the package chatterbot-corpus, labelled by topic.

A row is a question with its answer. Exchanges that share a sentence stay on one side of the split, so that the
evaluation asks nothing that training has shown. Knows the corpus; not where the rows go.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

LEFT_OUT = ("tech_support", "conversations")
"""Ten exchanges repeated a thousand times, and small talk about every topic."""
FEWEST_GROUPS = 20
"""Independent groups of exchanges a topic needs, so that both sides of the split show it in several."""
MOST_WORDS = 40
"""Longer exchanges (39 of 792: answers with code, encyclopedia entries) are left out: others are padded to them."""
EVAL_SHARE = 0.2
SHARED_WORDS = 3
"""Shorter answers ("Yes.") tell nothing of the question, so sharing them joins nothing."""


@dataclass(frozen=True)
class TopicRow:
    """One exchange. `group` is equal for exchanges that share a sentence."""

    text: str
    label: str
    group: str


def read_topics(folder: Path) -> list[TopicRow]:
    """The exchanges of all topics with enough independent groups, each text once."""
    exchanges = [one for file in sorted(folder.glob("*.yml")) if file.stem not in LEFT_OUT for one in _exchanges(file)]
    groups = _join([sentences for _, sentences in exchanges])
    rows: dict[str, TopicRow] = {}
    for (label, sentences), group in zip(exchanges, groups, strict=True):
        text = " ".join(sentences)
        if len(text.split()) <= MOST_WORDS:
            rows.setdefault(_plain(text), TopicRow(text, label, group))
    by_label: dict[str, set[str]] = defaultdict(set)
    for row in rows.values():
        by_label[row.label].add(row.group)
    return [row for row in rows.values() if len(by_label[row.label]) >= FEWEST_GROUPS]


def split_topics(rows: list[TopicRow]) -> tuple[list[TopicRow], list[TopicRow]]:
    """Training and evaluation rows: of each topic about a fifth, whole groups, in the order of a hash."""
    size, evaluated = Counter(row.label for row in rows), Counter[str]()
    members: dict[str, list[TopicRow]] = defaultdict(list)
    for row in rows:
        members[row.group].append(row)
    chosen = set()
    for group in sorted(members, key=lambda name: hashlib.sha256(name.encode()).digest()):
        label = members[group][0].label
        if evaluated[label] + len(members[group]) <= EVAL_SHARE * size[label]:
            chosen.add(group)
            evaluated.update(row.label for row in members[group])
    return [row for row in rows if row.group not in chosen], [row for row in rows if row.group in chosen]


def _exchanges(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(topic, [question, answer]) of one file; a long conversation is cut into its exchanges."""
    with file.open(encoding="utf-8") as stream:
        conversations = yaml.load(stream, yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    for turns in conversations["conversations"]:
        spoken = [str(turn).strip() for turn in turns]
        for start in range(0, len(spoken) - 1, 2):
            yield file.stem, spoken[start : start + 2]


def _join(exchanges: list[list[str]]) -> list[str]:
    """A name for each exchange, equal where a chain of shared sentences joins two: the chain's alphabetically first."""
    plain = [[_plain(sentence) for sentence in sentences] for sentences in exchanges]
    telling = [
        [question, *(text for text in answers if len(text.split()) >= SHARED_WORDS)] for question, *answers in plain
    ]
    names = {text: text for texts in telling for text in texts}
    before: dict[str, str] = {}
    while names != before:
        before = dict(names)
        for texts in telling:
            names |= dict.fromkeys(texts, min(names[text] for text in texts))
    return [names[texts[0]] for texts in telling]


def _plain(text: str) -> str:
    """Words alone, lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))
