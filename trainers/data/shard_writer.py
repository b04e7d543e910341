"""One unit of rows to one shard: sequences, a ledger line for each input row, and a record that commits both.

Owns the layout of shard files and what "done" means for one of them. Memory is bounded by a batch, not by the unit.
Knows no Ray; the stage that spreads units over a cluster is `orchestrator.shards`. Begin at `write_unit`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from trainers.data.formats import RawRow
from trainers.data.keys import SplitPlan
from trainers.data.manifest import ShardRecord
from trainers.data.readers import Unit, read_unit
from trainers.data.shard_files import LedgerFile, SequenceFile
from trainers.data.tokenizer import Encoder, load_encoder
from trainers.storage import Folder
from trainers.tasks import Encoded, EncodeRules, Task, load_task

ENCODE_ROWS = 1000
ENCODE_CHARS = 2 * 2**20
"""Rows and characters that are tokenized at once; a tokenizer's result takes about 150 bytes a token."""
MALFORMED = "malformed"


@dataclass(frozen=True)
class ShardWork:
    """What any process needs in order to write any shard of a split."""

    folder: Folder
    plan: SplitPlan
    task: str
    columns: Mapping[str, str]
    """For each field of the task, the data's column."""
    rules: EncodeRules
    model_path: str
    trust_remote_code: bool = False


def write_unit(work: ShardWork, unit: Unit) -> ShardRecord:
    """Read, tokenize and write one unit. Doing it again gives the same bytes.

    Raises:
        DataError: where the file is damaged beyond a single row.
        JobError: where the tokenizer cannot be loaded.
    """
    rows = read_unit(unit, work.plan.sources[unit.file], work.columns)
    mine = ((row, fields) for row, fields in rows if work.plan.holds(unit.file, row))
    encoder = load_encoder(work.model_path, work.trust_remote_code)
    return write_shard(work.folder, unit.index, unit.file, mine, load_task(work.task), encoder, work.rules)


def write_shard(
    folder: Folder,
    number: int,
    file: int,
    rows: Iterator[RawRow],
    task: Task,
    encoder: Encoder,
    rules: EncodeRules,
) -> ShardRecord:
    """Encode rows of one file into shard `number` and commit it by writing its record last."""
    stem = f"{number:05d}"
    shard, ledger = f"shard-{stem}.arrow", f"ledger-{stem}.arrow"
    with ExitStack() as files:
        sequence_file = SequenceFile(files.enter_context(folder.open_output(shard)), task, file)
        ledger_file = LedgerFile(files.enter_context(folder.open_output(ledger)), file)
        for batch in _batches(rows):
            encoded = _encode(batch, task, encoder, rules)
            for (row, _), one in zip(batch, encoded, strict=True):
                ledger_file.add(row, one)
                sequence_file.add(row, one)
        sequence_file.close()
        ledger_file.close()
    record = ShardRecord(
        file=shard,
        ledger=ledger,
        rows=sequence_file.rows,
        tokens=sequence_file.tokens,
        targets=sequence_file.targets,
        bytes=sequence_file.bytes,
        digest=sequence_file.digest,
        outcomes=ledger_file.outcomes,
        tokens_lost=ledger_file.tokens_lost,
        labels=sequence_file.labels,
    )
    folder.write_json(_record_name(number), record.model_dump(mode="json"))
    return record


def finished_shards(folder: Folder, units: Sequence[Unit]) -> dict[int, ShardRecord]:
    """Records of the units that an earlier run committed here; one whose files are not as it says does not count."""
    held = set(folder.list())
    return {
        unit.index: record
        for unit in units
        if _record_name(unit.index) in held and (record := _read_record(folder, unit.index, held))
    }


def _read_record(folder: Folder, number: int, held: set[str]) -> ShardRecord | None:
    try:
        record = ShardRecord.model_validate_json(folder.read_bytes(_record_name(number)))
    except ValidationError:
        return None
    whole = {record.file, record.ledger} <= held and folder.size(record.file) == record.bytes
    return record if whole else None


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Consecutive rows, bounded in number and in characters."""
    batch: list[RawRow] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += _chars(row[1])
        if len(batch) == ENCODE_ROWS or chars >= ENCODE_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list) else 0


def _encode(batch: Sequence[RawRow], task: Task, encoder: Encoder, rules: EncodeRules) -> list[Encoded]:
    """One result a row; malformed rows never reach the task."""
    whole = [fields for _, fields in batch if fields is not None]
    encoded = task.encode(whole, encoder, rules) if whole else []
    assert len(encoded) == len(whole), f"{type(task).__name__}.encode gave {len(encoded)} results for {len(whole)} rows"
    results = iter(encoded)
    return [Encoded.dropped(MALFORMED) if fields is None else next(results) for _, fields in batch]
