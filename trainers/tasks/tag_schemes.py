"""Schemes of tags that mark entities: BIO and BIOES are kept as they are, others are written as one of the two.

IO and IOB1 (an entity may begin with I-) become BIO; BILOU and BMES become BIOES (L- and U-, M- are its E-, S-, I-);
B, I, O without a type get the type ENTITY; a row that is neither becomes BIO. A row with an entity is of one scheme
alone, so each is converted by itself. Begin at `normalized`.
"""

import re
from collections.abc import Iterable, Sequence

OUTSIDE, PLAIN = "O", "ENTITY"
TAG = re.compile(r"O|[BIEMSUL](-.+)?", re.DOTALL)
SAME = {"L": "E", "U": "S", "M": "I"}
"""Letters of other schemes, as BIOES has them."""
STARTS, ENDS = frozenset("BS"), frozenset("ES")

Entity = tuple[str, int, int]
"""type, first word, word after the last."""


def normalized(tags: Sequence[str]) -> tuple[list[str], str | None]:
    """Tags in BIO or BIOES, and the note to make of it: None for what was BIO."""
    parts = [_parts(tag) for tag in tags]
    plain = [letter if letter == OUTSIDE else f"{letter}-{kind}" for letter, kind in parts]
    entities = find_entities(plain)
    if plain == write_tags(len(plain), entities, ends=False):
        return plain, None if plain == list(tags) else f"tags without a type, which was written as {PLAIN}"
    if plain == write_tags(len(plain), entities, ends=True):
        same = plain == list(tags)
        return plain, "tags in BIOES" if same else "tags in another scheme, which were written as BIOES"
    return write_tags(len(plain), entities, ends=False), "tags in another scheme, which were written as BIO"


def in_scheme(tags: Sequence[str], ends: bool) -> list[str]:
    """Tags of BIO or BIOES in BIOES (`ends`) or in BIO."""
    return write_tags(len(tags), find_entities(tags), ends)


def find_entities(tags: Iterable[str]) -> list[Entity]:
    """Entities in order. One goes on with I- or E- of its type; any other tag but O begins one."""
    entities: list[Entity] = []
    goes_on = False
    for word, (letter, kind) in enumerate(map(_parts, tags)):
        if letter == OUTSIDE:
            goes_on = False
        elif goes_on and letter not in STARTS and entities[-1][0] == kind:
            entities[-1] = (kind, entities[-1][1], word + 1)
        else:
            entities.append((kind, word, word + 1))
        goes_on = letter != OUTSIDE and letter not in ENDS
    return entities


def write_tags(words: int, entities: Iterable[Entity], ends: bool) -> list[str]:
    tags = [OUTSIDE] * words
    for kind, start, stop in entities:
        inner = "B" + "I" * (stop - start - 1)
        if ends:
            inner = "S" if stop - start == 1 else inner[:-1] + "E"
        tags[start:stop] = [f"{letter}-{kind}" for letter in inner]
    return tags


def _parts(tag: str) -> tuple[str, str]:
    """Letter, as BIOES has it, and type of a tag."""
    letter = SAME.get(tag[0], tag[0])
    return (OUTSIDE, "") if tag == OUTSIDE else (letter, tag[2:] or PLAIN)
