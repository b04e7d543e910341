"""Published chat templates: the targets are those of the oracle, or the refusal is one that docs/chats.md states."""

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


def test_targets_are_the_oracles_and_the_table_says_so(tmp_path: Path) -> None:
    pairs = templates()
    assert len(pairs) >= 25 and len(SHAPES) >= 14
    encoder = encoder_of(str(make_tokenizer(tmp_path, [text for pair in pairs.values() for text in pair])))
    verdicts = {(name, shape): verdict_of(encoder, pairs[name], shape) for name in pairs for shape in SHAPES}
    assert {cell: verdict for cell, verdict in verdicts.items() if verdict not in VERDICTS} == {}
    assert sum(verdict in ("same", "same*") for verdict in verdicts.values()) > len(verdicts) / 2
    written = DOCS.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(verdicts), "run python -m tests.trainers.tasks.chat.table"
