"""One unit of rows to one shard: sequences, a ledger line for each input row, counts, and a record that commits them.

Owns the layout of shard files and what "done" means for one of them. Memory is bounded by a batch, not by the unit.
Knows no Ray; the stage that spreads units over a cluster is `orchestrator.sharding.stage`. Begin at `write_units`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import ValidationError

from trainers.records import Array
from trainers.shards.contamination import contained, read_texts
from trainers.shards.duplicates import read_removed
from trainers.shards.files import LedgerFile, SequenceFile, counts_name, ledger_name, record_name, shard_name
from trainers.shards.keys import SplitPlan
from trainers.shards.manifest import ShardRecord
from trainers.sources.formats import RawRow
from trainers.sources.readers import Unit, read_unit
from trainers.sources.text_digest import text_digests
from trainers.storage import Folder, StagedFile, array_bytes
from trainers.tasks import EncodeRules, Task, encode_rows, load_task
from trainers.tokenizer.encoder import Encoder, TokenizerSpec, encoder_of
from trainers.tokenizer.token_arrays import EncodedBatch

ENCODE_ROWS = 4000
ENCODE_CHARS = 2 * 2**20
"""Rows and characters that are tokenized at once; what tokenizers gives takes about 150 bytes a token."""
COMMITS = 8
"""Shards that may be on their way to the disk: files synced at the same time share a commit of the journal."""
MALFORMED, CONTAMINATED = "dropped:malformed", "removed:in_evaluation"


@dataclass(frozen=True)
class ShardWork:
    """What any process needs in order to write any shard of a split."""

    folder: Folder
    plan: SplitPlan
    task: str
    columns: Mapping[str, str]
    """For each field of the task, the data's column."""
    rules: EncodeRules
    tokenizer: TokenizerSpec
    fast: bool = True
    """Use a faster library than tokenizers where it loads the tokenizer."""


@dataclass(frozen=True)
class StagedShard:
    """A shard whose files are written but not yet synced or named."""

    folder: Folder
    number: int
    files: tuple[StagedFile, ...]
    record: ShardRecord

    def commit(self) -> ShardRecord:
        """Sync and name the files, then write the record.

        The record itself and the names are made durable with the manifest: until then a crash of the machine costs at
        most shards that are written again, as sizes and records that are not whole do not count.
        """
        try:
            for file in self.files:
                file.commit()
        finally:
            for file in self.files:
                file.discard()
        record = self.folder.stage_output(record_name(self.number))
        record.stream.write(self.record.model_dump_json().encode())
        record.commit(durable=False)
        return self.record


def write_units(work: ShardWork, units: Sequence[Unit]) -> Iterator[tuple[Unit, ShardRecord]]:
    """Write units one after another; while some are synced to disk, the next is tokenized. Those done are passed over.

    Raises:
        DataError: where a file is damaged beyond a single row.
        JobError: where the tokenizer cannot be loaded.
        TokenizerDiffers: where the split has to be written with tokenizers alone.
    """
    with ThreadPoolExecutor(COMMITS, thread_name_prefix="commit") as threads:
        waiting: list[tuple[Unit, Future[ShardRecord]]] = []
        for unit in units:
            if record := finished_shard(work.folder, unit.index):
                yield unit, record
                continue
            waiting.append((unit, threads.submit(write_unit(work, unit).commit)))
            if len(waiting) > COMMITS:
                done, future = waiting.pop(0)
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def write_unit(work: ShardWork, unit: Unit) -> StagedShard:
    """Read, tokenize and write one unit; `commit` ends it. Doing it again gives the same bytes."""
    plan = work.plan
    rows = read_unit(unit, plan.sources[unit.file], work.columns)
    return write_shard(
        work.folder,
        unit.index,
        unit.file,
        ((row, fields) for row, fields in rows if plan.holds(unit.file, row)) if plan.fraction else rows,
        load_task(work.task),
        encoder_of(work.tokenizer, work.fast),
        work.rules,
        removed=read_removed(work.folder, unit.index, plan.dedup) if plan.dedup else {},
        held_out=read_texts(work.folder.parent / plan.eval_key) if plan.eval_key else None,
        unit=plan.unit_digest(unit),
    )


def write_shard(
    folder: Folder,
    number: int,
    file: int,
    rows: Iterable[RawRow],
    task: Task,
    encoder: Encoder,
    rules: EncodeRules,
    removed: Mapping[int, str] = MappingProxyType({}),
    held_out: Array | None = None,
    unit: str = "",
) -> StagedShard:
    """Encode rows of one file into shard `number`, which nobody sees before `commit`.

    Args:
        removed: for rows that are left out on request, the outcome that the ledger gives them.
        held_out: digests of texts that are left out, uint64, sorted.
        unit: digest of what the rows are and how they are encoded.
    """
    names = shard_name(number), ledger_name(number), counts_name(number)
    with ExitStack() as unfinished:
        files = [folder.stage_output(name) for name in names]
        for staged in files:
            unfinished.callback(staged.discard)
        sequence_file, ledger_file = SequenceFile(files[0].stream, task, file), LedgerFile(files[1].stream, file)
        notes: Counter[str] = Counter()
        for batch in _batches(rows):
            places = np.array([row for row, _ in batch], dtype=np.int64)
            texts = text_digests(fields for _, fields in batch)
            seen = contained(texts, held_out) if held_out is not None else None
            encoded = _encode(batch, task, encoder, rules, removed, seen)
            ledger_file.add(places, encoded, texts)
            sequence_file.add(places, encoded)
            notes.update(encoded.notes)
        sequence_file.close()
        ledger_file.close()
        files[2].stream.write(array_bytes(sequence_file.counts))
        unfinished.pop_all()
    record = ShardRecord(
        file=names[0],
        ledger=names[1],
        unit=unit,
        source=file,
        rows=len(sequence_file.counts),
        tokens=int(sequence_file.counts["length"].sum()),
        targets=int(sequence_file.counts["targets"].sum()),
        bytes=sequence_file.bytes,
        digest=sequence_file.digest,
        outcomes=ledger_file.outcomes,
        tokens_lost=ledger_file.tokens_lost,
        labels=sequence_file.labels,
        notes=dict(sorted(notes.items())),
    )
    return StagedShard(folder, number, tuple(files), record)


def finished_shards(folder: Folder, units: Sequence[Unit]) -> dict[int, ShardRecord]:
    """Records of the units that an earlier run committed here; one whose files are not as it says does not count."""
    held = set(folder.list())
    return {
        unit.index: record
        for unit in units
        if record_name(unit.index) in held and (record := finished_shard(folder, unit.index))
    }


def finished_shard(folder: Folder, number: int) -> ShardRecord | None:
    """The record of one unit, if it was committed here and its files are as it says."""
    try:
        record = ShardRecord.model_validate_json(folder.read_bytes(record_name(number)))
        whole = folder.size(record.file) == record.bytes
        whole = whole and folder.exists(record.ledger) and folder.exists(counts_name(number))
    except (ValidationError, FileNotFoundError):
        return None
    return record if whole else None


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    chars = 0
    for row in rows:
        batch.append(row)
        if row[1] is not None:
            for value in row[1].values():
                chars += len(value) if isinstance(value, str) else _chars(value)
        if len(batch) >= ENCODE_ROWS or chars >= ENCODE_CHARS:
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


def _encode(
    batch: Sequence[RawRow],
    task: Task,
    encoder: Encoder,
    rules: EncodeRules,
    removed: Mapping[int, str],
    seen: Array | None,
) -> EncodedBatch:
    """One outcome a row; malformed and removed rows never reach the task."""
    outcomes = [MALFORMED if fields is None else removed.get(row) for row, fields in batch]
    for place in np.flatnonzero(seen).tolist() if seen is not None else ():
        outcomes[place] = outcomes[place] or CONTAMINATED
    return encode_rows(task, [fields or {} for _, fields in batch], encoder, rules, outcomes)
