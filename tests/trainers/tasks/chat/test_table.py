"""Published chat templates: the targets are those of the oracle, or the refusal is one that docs/chats.md states."""

import random
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the published templates come with the package trl (pip install --no-deps trl)")

from tests.trainers.tasks.chat.table import (
    BEGIN,
    DOCS,
    END,
    SHAPES,
    VERDICTS,
    encoder_of,
    make_tokenizer,
    table,
    templates,
    verdict_of,
)
from trainers.tasks.chat.render import ChatRenderer

CONTENTS = [
    "good film",
    "\nnew lines\n",
    " \n padded\t",
    "\n\n",
    "日本 👍",
    "so</think>it is",
    "<think>x</think>\n\ny",
    "a\n\nb",
]


QUICK = ("glm4moe", "gptoss", "llama3", "qwen2_5", "qwen3", "qwen3_5_think")


def test_pieces_are_what_published_templates_write(tmp_path: Path) -> None:
    """Also of templates that strip single characters or write a turn otherwise at the end, as Qwen3's."""
    pairs, draw = templates(), random.Random(2)
    encoder = encoder_of(str(make_tokenizer(tmp_path, [pairs[name][0] for name in QUICK])))
    talks = [[{"role": role, "content": draw.choice(CONTENTS)} for _ in range(turns) for role in ("user", "assistant")]
             for turns in (1, 2) for _ in range(8)]  # fmt: skip
    for name in QUICK:
        quick, exact = (ChatRenderer(encoder, way, pairs[name][0]) for way in (True, False))
        assert [quick.render(messages) for messages in talks] == [exact.render(messages) for messages in talks], name
        assert any(map(quick._put_together, talks)), name


def test_targets_are_the_oracles_and_the_table_says_so(tmp_path: Path) -> None:
    pairs = templates()
    assert len(pairs) >= 25 and len(SHAPES) >= 14
    encoder = encoder_of(str(make_tokenizer(tmp_path, [text for pair in pairs.values() for text in pair])))
    verdicts = {(name, shape): verdict_of(encoder, pairs[name], shape) for name in pairs for shape in SHAPES}
    assert {cell: verdict for cell, verdict in verdicts.items() if verdict not in VERDICTS} == {}
    assert sum(verdict in ("same", "same*") for verdict in verdicts.values()) > len(verdicts) / 2
    written = DOCS.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(verdicts), "run python -m tests.trainers.tasks.chat.table"
