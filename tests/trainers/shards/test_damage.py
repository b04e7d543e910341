"""Files damaged at random: every row is accounted for, with exact counts, whatever the units and the damage."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers.shards.ledger import ledger_lines, matches
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder

GOOD, LONG = {"text": "the film is good"}, {"text": "the plot " * 60}
ROWS: dict[str, tuple[bytes, str]] = {
    "good": (json.dumps(GOOD).encode(), "kept"),
    "long": (json.dumps(LONG).encode(), "truncated"),
    "torn": (json.dumps(GOOD).encode()[:-3], "dropped:malformed"),
    "flipped": (json.dumps(GOOD).encode().replace(b"film", b"f\xff\xfem"), "dropped:malformed"),
    "zeros": (b"\x00" * 40, "dropped:malformed"),
    "a list": (b'["text"]', "dropped:malformed"),
    "half a pair": (b'{"text": "\\udfff"}', "dropped:malformed"),
    "two in a line": (json.dumps(GOOD).encode() * 2, "dropped:malformed"),
    "no text": (b'{"texd": "a"}', "dropped:missing_text"),
    "null": (b'{"text": null}', "dropped:missing_text"),
    "number": (b'{"text": 7}', "dropped:text_not_a_string"),
    "blank text": (b'{"text": " \\n"}', "dropped:empty_text"),
    "not a number": (b'{"text": "the film", "n": NaN}', "kept"),
    "huge number": (b'{"text": "the film", "n": 123456789012345678901234567890}', "kept"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=60), unit_bytes=st.integers(16, 4000))
def test_every_row_of_a_damaged_file_is_counted_once(
    names: list[str], unit_bytes: int, tmp_path: Path, make_job: Any, shard_here: Any, tiny_chat_tokenizer: Path
) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"\n".join(ROWS[name][0] for name in names))
    job = make_job("pretrain", tiny_chat_tokenizer, train=[path], eval=[path], max_length=64, overlong="truncate",
                   max_drop_fraction=1.0)  # fmt: skip
    manifest = shard_here(job, unit_bytes=unit_bytes).train
    expected = [ROWS[name][1] for name in names]
    assert manifest.rows_in == len(names)
    assert manifest.outcomes == {outcome: expected.count(outcome) for outcome in sorted(set(expected))}
    folder = shards_folder(Folder(job.storage), manifest.key)
    lines = list(ledger_lines(folder, manifest))
    assert [line.outcome for line in lines] == expected
    assert [line.row for line in lines] == [
        sum(len(ROWS[name][0]) + 1 for name in names[:i]) for i in range(len(names))
    ]
    assert sum(line.tokens for line in lines) == manifest.total("tokens")
    assert sum(line.tokens_lost for line in lines) == manifest.total("tokens_lost")
    kept = [
        row for shard in manifest.shards for row in pa.ipc.open_file(folder.open_input(shard.file)).read_all()["row"]
    ]
    assert [row.as_py() for row in kept] == [line.row for line in lines if not line.outcome.startswith("dropped")]
    for reason in ("kept", "dropped", "malformed"):
        assert [line.row for line in ledger_lines(folder, manifest, reason)] == [
            line.row for line in lines if matches(line.outcome, reason)
        ]
