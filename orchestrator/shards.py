"""The data stage: rows to committed shards, one Ray Data task a unit.

Reading, tokenizing and writing a unit is one task, because rows as JSON gives them (values of mixed types, malformed
lines) do not pass unchanged through the Arrow blocks between Ray Data's operators, and a unit without rows would leave
no block behind. Ray Data places the tasks, retries those whose worker died, and streams back one small record each,
which is all the driver ever holds. No pool of actors: on a small machine it leaves no core to those that feed it.
Begin at `write_shards`.
"""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trainers.data.budget import check_shards
from trainers.data.keys import SplitPlan, explain_miss, manifest_of, plan_splits, write_key
from trainers.data.manifest import MANIFEST, ShardManifest, ShardRecord, Shards, read_manifest, shards_folder
from trainers.data.readers import Unit, check_columns, needed_fields, plan_units, task_columns
from trainers.data.shard_writer import ShardWork, finished_shards, write_unit
from trainers.errors import JobError, TuneyardError
from trainers.job import Job
from trainers.storage import TEMPORARY, Folder
from trainers.tasks import encode_rules

log = logging.getLogger(__name__)
STALE_S = 3600
"""Temporary files older than this were left by a killed run; younger ones may be another run's."""


@dataclass(frozen=True)
class ShardProgress:
    """How far a split is; rows and tokens are those of this split's sequences so far."""

    split: str
    units_done: int
    units_total: int
    rows: int
    tokens: int


Report = Callable[[ShardProgress], None]


def write_shards(job: Job, model_path: str, on_progress: Report | None = None) -> Shards:
    """Write what is not yet written of both splits, and check that the job accepts it.

    Args:
        job: the job.
        model_path: folder of the prepared model, for its tokenizer.
        on_progress: called on the driver after each unit.

    Raises:
        JobError: for files or columns that are not there.
        DataError: for files that are not what their names say, empty splits, rows dropped over budget, unseen labels.
    """
    plans = plan_splits(job, model_path)
    storage = Folder(job.storage)
    committed = {plan.name: read_manifest(shards_folder(storage, plan.key)) for plan in plans}
    _check_sources(job, [plan for plan in plans if committed[plan.name] is None])
    manifests = [committed[plan.name] or _write_split(job, plan, model_path, on_progress) for plan in plans]
    shards = Shards(train=manifests[0], eval=manifests[1])
    check_shards(job, shards)
    return shards


def _check_sources(job: Job, plans: Sequence[SplitPlan]) -> None:
    """Look at the start of each file before any task starts. Raises with the problems of all splits."""
    problems: dict[str, None] = {}
    for plan in plans:
        where = "data.train" if job.data.eval_fraction is not None else f"data.{plan.name}"
        try:
            check_columns(plan.sources, task_columns(job), needed_fields(job.task), where)
        except JobError as error:
            problems.update({f"{where}: {problem}": None for problem in error.problems})
    if problems:
        raise JobError(list(problems))


def _write_split(job: Job, plan: SplitPlan, model_path: str, on_progress: Report | None) -> ShardManifest:
    """Write the units of a split that are missing, then its manifest."""
    storage = Folder(job.storage)
    folder = shards_folder(storage, plan.key)
    if reason := explain_miss(storage, plan):
        log.info(reason)
    started = time.monotonic()
    _clean(folder)
    write_key(folder, plan)
    units = plan_units(plan.sources)
    records = finished_shards(folder, units)
    work = ShardWork(
        folder=folder,
        plan=plan,
        task=job.task,
        columns=task_columns(job),
        rules=encode_rules(job),
        model_path=model_path,
        trust_remote_code=job.model.trust_remote_code,
    )
    rows, tokens = sum(one.rows for one in records.values()), sum(one.tokens for one in records.values())
    for number, record in _write_units(work, [unit for unit in units if unit.index not in records]):
        records[number] = record
        rows, tokens = rows + record.rows, tokens + record.tokens
        if on_progress:
            on_progress(ShardProgress(plan.name, len(records), len(units), rows, tokens))
    manifest = manifest_of(plan, job.task, records)
    folder.write_bytes(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    log.info(
        f"sharded {manifest.rows_in:,} {plan.name} rows into {len(units)} files "
        f"({manifest.total('bytes') / 2**20:,.1f} MiB, {tokens:,} tokens) in {time.monotonic() - started:.1f} s"
    )
    return manifest


def _write_units(work: ShardWork, units: Sequence[Unit]) -> Iterator[tuple[int, ShardRecord]]:
    """Records of the units as they are finished, in whatever order. Raises what a unit raised."""
    if not units:
        return
    import ray

    shared = ray.put((work, tuple(units)))  # once, not once a task: it holds every file's name

    def write(row: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core; the other tasks have the others
        job, todo = _fetch(shared)
        unit = todo[row["id"]]
        try:
            return {"unit": unit.index, "record": write_unit(job, unit).model_dump_json(), "error": b""}
        except TuneyardError as error:  # as a value: Ray would wrap it and log its traceback
            return {"unit": unit.index, "record": "", "error": pickle.dumps(error)}

    with _quiet_ray_data():
        done = ray.data.range(len(units), override_num_blocks=len(units)).map(write, num_cpus=1)
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield int(row["unit"]), ShardRecord.model_validate_json(row["record"])


@lru_cache(maxsize=1)
def _fetch(shared: Any) -> tuple[ShardWork, tuple[Unit, ...]]:
    """What the driver put into the object store, unpacked once a process."""
    import ray

    fetched: tuple[ShardWork, tuple[Unit, ...]] = ray.get(shared)
    return fetched


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without bars and without notes on each execution; the program shows progress itself."""
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, level = before
        logger.setLevel(level)


def _clean(folder: Folder) -> None:
    """Remove what killed runs left under temporary names; object stores have none."""
    if not folder.is_local or not folder.exists():
        return
    for path in folder.path.glob(f"{TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)
