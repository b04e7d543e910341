"""A unit becomes a shard, a ledger and a record that agree with each other and with the input, byte for byte again."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import xxhash

from trainers.shards import files as shard_files
from trainers.shards import writer as shard_writer
from trainers.shards.manifest import ShardManifest, shards_folder
from trainers.shards.writer import finished_shards, write_shard
from trainers.sources.formats.base import RawRow
from trainers.sources.readers import plan_units
from trainers.storage import Folder
from trainers.tasks import EncodeRules, load_task
from trainers.tokenizer.encoder import load_encoder

TEXTS = ["a good film", "the plot was bad", "", None, "a " * 40, 17]


def rows_of(count: int) -> list[RawRow]:
    """Rows of every outcome, in a fixed disorder."""
    draw = random.Random(0)
    rows: list[RawRow] = []
    for place in range(count):
        text = draw.choice(TEXTS)
        rows.append(
            (place * 10, None if draw.random() < 0.1 else {"text": text, "label": draw.choice(["good", "bad"])})
        )
    return rows


def write(folder: Folder, rows: list[RawRow], model: Path, task: str = "classify", **rules: Any) -> Any:
    limits = EncodeRules(**{"max_length": 16, "overlong": "truncate", **rules})
    return write_shard(folder, 3, 1, iter(rows), load_task(task), load_encoder(str(model)), limits).commit()


def read(folder: Folder, name: str) -> pa.Table:
    return pa.ipc.open_file(folder.open_input(name)).read_all()


def test_record_ledger_and_shard_agree_with_the_input(tmp_path: Path, tiny_tokenizer: Path) -> None:
    folder, rows = Folder(str(tmp_path)), rows_of(500)
    record = write(folder, rows, tiny_tokenizer)
    shard, ledger = read(folder, record.file), read(folder, record.ledger)
    assert (record.file, record.ledger) == ("shard-00003.arrow", "ledger-00003.arrow")
    assert shard.schema.names == ["input_ids", "file", "row", "part", "label", "pair_start", "several"]
    assert ledger["row"].to_pylist() == [row for row, _ in rows] and set(ledger["file"].to_pylist()) == {1}
    assert sum(record.outcomes.values()) == len(rows)
    assert record.outcomes["dropped:malformed"] == sum(fields is None for _, fields in rows)
    assert set(record.outcomes) == {
        "kept",
        "truncated",
        *(f"dropped:{reason}" for reason in ("malformed", "missing_text", "text_not_a_string", "empty_text")),
    }
    counted = {
        one["values"]: one["counts"] for one in pc.value_counts(pc.cast(ledger["outcome"], pa.string())).to_pylist()
    }
    assert counted == record.outcomes
    assert pc.sum(ledger["tokens"]).as_py() == record.tokens == len(pc.list_flatten(shard["input_ids"]))
    assert pc.sum(ledger["tokens_lost"]).as_py() == record.tokens_lost > 0
    kept = [row for row, outcome in zip(ledger["row"].to_pylist(), ledger["outcome"].to_pylist(), strict=True)
            if not outcome.startswith("dropped")]  # fmt: skip
    assert shard["row"].to_pylist() == kept and record.rows == record.targets == len(kept)
    assert sum(record.labels.values()) == record.rows and set(record.labels) == {"good", "bad"}
    stored = (tmp_path / record.file).read_bytes()
    assert (record.bytes, record.digest) == (len(stored), xxhash.xxh3_128_hexdigest(stored))


def test_batch_limits_change_neither_ledger_nor_sequences(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = write(Folder(str(tmp_path / "a")), rows_of(200), tiny_tokenizer)
    monkeypatch.setattr(shard_writer, "ENCODE_ROWS", 7)
    monkeypatch.setattr(shard_writer, "ENCODE_CHARS", 60)
    monkeypatch.setattr(shard_files, "BATCH_TOKENS", 50)
    monkeypatch.setattr(shard_files, "BATCH_ROWS", 11)
    small = write(Folder(str(tmp_path / "b")), rows_of(200), tiny_tokenizer)
    for name in (large.file, large.ledger):
        one, other = read(Folder(str(tmp_path / "a")), name), read(Folder(str(tmp_path / "b")), name)
        assert one.to_pylist() == other.to_pylist()
    assert small.model_copy(update={"bytes": large.bytes, "digest": large.digest}) == large
    file = pa.ipc.open_file(str(tmp_path / "b" / small.file))
    assert (
        max(pc.sum(pc.list_value_length(file.get_batch(i)[0])).as_py() for i in range(file.num_record_batches))
        < 50 + 16
    )


def test_rows_cut_into_windows_number_their_parts(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    rows: list[RawRow] = [(0, {"text": "x" * 100}), (200, {"text": "short"})]
    record = write(Folder(str(tmp_path)), rows, tiny_chat_tokenizer, "pretrain", overlong="split")
    shard = read(Folder(str(tmp_path)), record.file)
    assert record.outcomes == {"kept": 1, "split": 1} and record.rows > 2
    assert shard["part"].to_pylist() == [*range(record.rows - 1), 0]
    assert shard["row"].to_pylist() == [0] * (record.rows - 1) + [200]
    decode = load_encoder(str(tiny_chat_tokenizer)).tokenizer.decode
    ids = [one for row in shard["input_ids"].to_pylist()[:-1] for one in row]
    assert decode(ids) == "x" * 100 + "<|im_end|>"


def test_a_unit_without_rows_is_a_shard_too(tmp_path: Path, tiny_tokenizer: Path) -> None:
    record = write(Folder(str(tmp_path)), [], tiny_tokenizer)
    assert (record.rows, record.tokens, record.outcomes) == (0, 0, {})
    assert read(Folder(str(tmp_path)), record.file).num_rows == read(Folder(str(tmp_path)), record.ledger).num_rows == 0


def test_only_units_whose_record_and_files_are_whole_count_as_finished(
    tmp_path: Path, make_job: Any, shard_here: Any, write_rows: Any
) -> None:
    path = write_rows("x.jsonl", [{"text": "a good film", "label": "good"}] * 40)
    shards = shard_here(make_job(train=[path], eval=[path]), unit_bytes=150)
    folder = shards_folder(Folder(str(tmp_path / "storage")), shards.train.key)
    from trainers.sources.files import find_sources

    units = plan_units(find_sources([str(path)], None, "x"), 150)
    assert sorted(finished_shards(folder, units)) == list(range(len(units))) and len(units) >= 6
    folder.delete("shard-00000.json")
    folder.delete("ledger-00001.arrow")
    (folder.path / "shard-00002.arrow").write_bytes(b"short")
    (folder.path / "shard-00003.json").write_text("{")
    folder.delete("counts-00004.npy")
    assert sorted(finished_shards(folder, units)) == list(range(5, len(units)))


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_held_out_rows_and_the_rest_make_the_whole(
    fraction: float, make_job: Any, shard_here: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "a good film", "label": i % 2}) + "\n" for i in range(1000)))
    job = make_job(train=[path], eval_fraction=fraction)
    shards = shard_here(job, unit_bytes=4096)

    def places(manifest: ShardManifest) -> list[int]:
        folder = shards_folder(Folder(job.storage), manifest.key)
        return [row for shard in manifest.shards for row in read(folder, shard.ledger)["row"].to_pylist()]

    train, held_out = places(shards.train), places(shards.eval)
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 1000
    assert abs(len(held_out) / 1000 - fraction) < 0.06
    again = shard_here(job, unit_bytes=100_000)
    assert places(again.eval) == held_out
