"""The data stage: rows to committed shards, in Ray tasks of some units each.

The tasks (see `ray_tasks`) give back one small record a shard, which is all the driver ever holds. No process group is
alive meanwhile: nothing here imports torch. Begin at `write_shards`.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from orchestrator.planning.preflight import CheckedJob
from orchestrator.sharding.ray_tasks import map_tasks, map_units, start_workers
from trainers.job.schema import Job
from trainers.shards.contamination import EXAMPLES, Contamination, contamination_name, find_contamination
from trainers.shards.drop_budget import check_shards
from trainers.shards.duplicates import DedupMode, DuplicateSearch, find_duplicates, print_unit
from trainers.shards.files import record_name
from trainers.shards.keys import SplitPlan, gather_shards, manifest_of
from trainers.shards.manifest import (
    MANIFEST,
    ShardManifest,
    ShardRecord,
    Shards,
    other_manifests,
    read_manifest,
    shards_folder,
    write_manifest,
)
from trainers.shards.reuse import adopt_shards, explain_miss
from trainers.shards.writer import CONTAMINATED, ShardWork, finished_shards, write_units
from trainers.sources.readers import Unit, plan_units, read_unit, task_columns
from trainers.storage import TEMPORARY, Folder
from trainers.tasks import encode_rules
from trainers.tokenizer.encoder import encoder_of, read_spec
from trainers.tokenizer.gigatoken import TokenizerDiffers

log = logging.getLogger(__name__)
SMALL_BYTES, SMALL_UNITS = 16 * 2**20, 32
"""Sources that one core shards in about a second, where a cluster takes 2 to 4 s to start and each worker 2 s more."""
STALE_S = 3600
"""Temporary files older than this were left by a killed run; younger ones may be another run's."""
FALLBACK, DEDUPED = "fallback.json", "duplicates.json"
PRINTS_A_PART = 16_000_000
"""Fingerprints looked through at once: half a gigabyte."""
SCAN_SHARDS = 256
"""Ledgers that one task looks through."""


@dataclass(frozen=True)
class ShardProgress:
    """How far a split is; rows and tokens are those of this split's sequences so far."""

    split: str
    units_done: int
    units_total: int
    rows: int
    tokens: int


Report = Callable[[ShardProgress], None]


def write_shards(checked: CheckedJob, on_progress: Report | None = None) -> Shards:
    """Write what is not yet written of the splits, and check that the job accepts it.

    Args:
        checked: the job, its model for the tokenizer, and its splits.
        on_progress: called on the driver after each few units.

    Raises:
        DataError: for files that are damaged, empty splits, rows dropped over budget, unseen labels.
    """
    job, storage = checked.job, Folder(checked.job.storage)
    committed = {plan.name: read_manifest(shards_folder(storage, plan.key)) for plan in checked.splits}
    missing = [plan for plan in checked.splits if committed[plan.name] is None]
    for plan in checked.splits:
        _mark_used(shards_folder(storage, plan.key))
    on_driver = is_small(checked.splits)
    if missing and not on_driver:
        start_workers()
    for plan in reversed(missing) if job.data.decontaminate == "drop" else missing:
        committed[plan.name] = SplitStage(job, plan, checked.model.path, on_progress, on_driver).write()
    shards = gather_shards({name: manifest for name, manifest in committed.items() if manifest})
    assert shards is not None
    for held in shards.held.values():
        check_contamination(storage, shards.train, held, on_driver)
    check_shards(job, shards)
    return shards


def is_small(splits: Sequence[SplitPlan]) -> bool:
    """Whether the data is shards before a cluster would have started: then it is written in this process."""
    if sum(source.size for split in splits for source in split.sources) > SMALL_BYTES:
        return False
    return sum(len(plan_units(split.sources)) for split in splits) <= SMALL_UNITS


class SplitStage:
    """Writes the units of one split that are missing, then its manifest."""

    def __init__(self, job: Job, plan: SplitPlan, model_path: str, on_progress: Report | None, here: bool) -> None:
        self._plan, self._report, self._here = plan, on_progress, here
        self._storage = Folder(job.storage)
        self._folder = shards_folder(self._storage, plan.key)
        self._units = plan_units(plan.sources)
        self._work = ShardWork(
            folder=self._folder,
            plan=plan,
            task=job.task,
            columns=task_columns(job),
            rules=encode_rules(job),
            tokenizer=read_spec(model_path, job.model.trust_remote_code),
        )

    def write(self) -> ShardManifest:
        """Write, or finish, the split."""
        started = time.monotonic()
        if self._folder.exists(MANIFEST):
            log.warning(f"{self._folder}: these shards are of an earlier version of Tuneyard and are written again")
        _clean(self._folder)
        others = dict(other_manifests(self._storage, self._plan.key))
        if reason := explain_miss(self._plan, others):
            log.info(reason)
        if taken := adopt_shards(self._folder, self._plan, self._units, others):
            log.info(f"{taken:,} of {len(self._units):,} {self._plan.name} shards taken over: their files are the same")
        if self._plan.dedup and not self._folder.exists(DEDUPED):
            self._find_duplicates(self._plan.dedup)
        manifest = self._write_units()
        self._folder.sync()
        write_manifest(self._folder, manifest)
        for note, count in manifest.notes.items():
            log.warning(f"data.{self._plan.name}: {count:,} rows with {note}")
        log.info(
            f"sharded {manifest.rows_in:,} {self._plan.name} rows into {len(self._units)} files "
            f"({manifest.total('bytes') / 2**20:,.1f} MiB, {manifest.total('tokens'):,} tokens) "
            f"in {time.monotonic() - started:.1f} s with {manifest.tokenizer}"
        )
        return manifest

    def _write_units(self) -> ShardManifest:
        """Write every unit with one library: all again with tokenizers if a faster one gives other ids."""
        reason = self._folder.read_json(FALLBACK)["reason"] if self._folder.exists(FALLBACK) else None
        while True:
            work = replace(self._work, fast=reason is None)
            try:
                records = self._records(work)
            except TokenizerDiffers as error:
                reason = str(error)
                log.warning(f"{self._plan.name}: tokenizing again with tokenizers: {reason}")
                for unit in self._units:
                    self._folder.delete(record_name(unit.index))
                self._folder.write_json(FALLBACK, {"reason": reason})
                continue
            library = encoder_of(work.tokenizer, work.fast).library
            return manifest_of(self._plan, self._work.task, records, library, reason)

    def _records(self, work: ShardWork) -> dict[int, ShardRecord]:
        records = finished_shards(self._folder, self._units)
        rows, tokens = (sum(getattr(record, name) for record in records.values()) for name in ("rows", "tokens"))
        todo = [unit for unit in self._units if unit.index not in records]
        for number, record in map_units(write_group, work, todo, self._here):
            records[number] = record
            rows, tokens = rows + record.rows, tokens + record.tokens
            if self._report:
                self._report(ShardProgress(self._plan.name, len(records), len(self._units), rows, tokens))
        return records

    def _find_duplicates(self, mode: DedupMode) -> None:
        """Fingerprint the units, then settle hash range by hash range; the rows found are left out by the writers."""
        prints = sum(count for _, count in map_units(print_group, self._work, self._units, self._here))
        parts = max(prints // PRINTS_A_PART, 1)
        search = DuplicateSearch(self._folder, tuple(unit.index for unit in self._units), parts, mode)
        found = sum(count for _, count in map_tasks(find_duplicates, search, range(parts), self._here))
        self._folder.write_json(DEDUPED, {"mode": mode, "removed": found})
        for name in self._folder.list():
            if name.startswith(("prints-", "signatures-")):
                self._folder.delete(name)


def write_group(work: ShardWork, units: Sequence[Unit]) -> list[tuple[int, ShardRecord]]:
    """A task: write some units."""
    return [(unit.index, record) for unit, record in write_units(work, units)]


def print_group(work: ShardWork, units: Sequence[Unit]) -> list[tuple[int, int]]:
    """A task: fingerprint some units; the number of fingerprints of each."""
    plan, counts = work.plan, []
    assert plan.dedup is not None
    for unit in units:
        rows = read_unit(unit, plan.sources[unit.file], work.columns)
        mine = ((row, fields) for row, fields in rows if plan.holds(unit.file, row))
        counts.append((unit.index, print_unit(work.folder, unit.index, mine, plan.dedup)))
    return counts


def check_contamination(
    storage: Folder, train: ShardManifest, held: ShardManifest, here: bool = False
) -> Contamination:
    """Count the training rows that an evaluation set holds too, once for a pair of splits, and warn of them."""
    folder, eval_folder = shards_folder(storage, train.key), shards_folder(storage, held.key)
    name = contamination_name(held.key)
    if folder.exists(name):
        return Contamination.model_validate(folder.read_json(name))
    groups = [train.shards[start : start + SCAN_SHARDS] for start in range(0, len(train.shards), SCAN_SHARDS)]
    by_group = dict(map_tasks(find_contamination, (folder, eval_folder, train.sources), groups, here))
    examples = [example for index in sorted(by_group) for example in by_group[index].examples][:EXAMPLES]
    total = Contamination(rows=sum(part.rows for part in by_group.values()), examples=tuple(examples))
    folder.write_json(name, total.model_dump(mode="json"))
    decides = held.split == "eval"
    kept = total.rows - (train.outcomes.get(CONTAMINATED, 0) if decides else 0)
    if kept > 0:
        one = "an evaluation row" if decides else f"a row of data.{held.split}"
        remedy = "data.decontaminate: drop leaves them out" if decides else "take them out of data.train"
        log.warning(
            f"{kept:,} of {train.rows_in:,} training rows say what {one} says (first: "
            f"{', '.join(map(str, examples[0]))}); {remedy}"
        )
    return total


def _mark_used(folder: Folder) -> None:
    """Say by the time of the manifest that a run is about to use the set: `tuneyard gc` leaves those alone."""
    if folder.is_local and folder.exists(MANIFEST):
        with suppress(PermissionError):  # somebody else's; only they may clear it away
            os.utime(folder.path / MANIFEST)


def _clean(folder: Folder) -> None:
    """Remove what killed runs left under temporary names; object stores have none."""
    if not folder.is_local or not folder.exists():
        return
    for path in folder.path.glob(f"{TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)
