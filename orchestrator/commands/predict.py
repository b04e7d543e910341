"""`tuneyard predict`: what a run's best checkpoint, a registered model or a model folder says to rows of any data."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.commands.find_run import JOB_FILE, find_job
from orchestrator.commands.past_run import best_step, shards_of
from orchestrator.evaluation.predictions import predict_on_workers
from orchestrator.registry.manage import pick_version
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.read import ModelVersion
from trainers.checkpoint.export import export_checkpoint
from trainers.errors import JobError
from trainers.evaluation.predict import check_asked, predict
from trainers.job.load import load_job
from trainers.job.schema import Job
from trainers.model.source import prepare_model
from trainers.run.folder import checkpoints_folder, step_name
from trainers.run.record import job_task
from trainers.sources.files import find_sources
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.storage import Folder

ROWS_A_GROUP = 10_000
"""Rows in a row group of a Parquet file."""


@dataclass(frozen=True)
class Model:
    """A model folder, and the job that says what its rows look like."""

    path: str
    job: Job
    version: ModelVersion | None = None
    """Where the registry named it."""


def find_model(name: str, storage: str, step: int | None, uri: str | None, overrides: list[str]) -> Model:
    """The model that is meant: a model folder of an export, a run, or NAME[@VERSION] in the registry.

    Raises:
        JobError: where it is none of them, or the job of a model folder is not known.
    """
    if (Path(name) / "config.json").exists():
        run = Path(name).absolute().parent.parent  # <run>/export/step-00000080
        if not (run / JOB_FILE).exists():
            raise JobError(f"{name} does not lie in a run folder, so its job is not known: name the run instead")
        return Model(str(Path(name).absolute()), load_job(run / JOB_FILE, overrides))
    model, _, version = name.partition("@")
    try:
        job, run_folder = find_job(name, storage, overrides)
    except JobError as error:
        if Path(name).exists() or "/" in name:
            raise
        try:
            registered = pick_version(registry_uri(storage, uri), model, version or None)
        except JobError as unknown:
            raise JobError(f"{name!r} is neither a run ({error}) nor a registered model ({unknown})") from None
        return Model(registered.source, find_job(registered.run, storage, overrides)[0], registered)
    return Model(_export(job, run_folder, step), job)


def _export(job: Job, run: Folder, step: int | None) -> str:
    """The model folder of a step; one that was exported before is taken as it is."""
    checkpoints = checkpoints_folder(job, run)
    step = best_step(run, checkpoints) if step is None else step
    out = run / "export" / step_name(step)
    if not out.exists("tuneyard.json"):
        source = prepare_model(job).path
        task = job_task(job, shards_of(job, run).train, source)
        export_checkpoint(checkpoints / step_name(step), out, job, task, source)
    return str(out.path)


def predict_file(model: Model, data: list[str], out: str | None, workers: int = 1, address: str | None = None) -> int:
    """Predict every row of the data and write one record a row, in order. Returns their number.

    Args:
        data: paths, globs or folders, in any format that training reads.
        out: a .jsonl or .parquet file, which appears when it is whole; None prints lines of JSON.
        workers: processes that share the rows; 0: as many as the cluster has room for.
        address: of the cluster.

    Raises:
        DataError: for files that are not what they are said to be.
        JobError: for data that is not there or lacks the task's columns, or another kind of output.
    """
    if out is not None and Path(out).suffix not in (".jsonl", ".parquet"):
        raise JobError(f"--out {out}: name a file that ends in .jsonl or .parquet")
    read, shown = tee(_rows(model.job, [str(Path(one).absolute()) if "://" not in one else one for one in data]))
    if workers == 1:
        predictions = predict(model.job, model.path, read)
    else:
        predictions = predict_on_workers(model.job, model.path, read, workers, address)
    records = ({**(row or {}), **said} for row, said in zip(shown, predictions, strict=True))
    if out is None:
        return _write_lines(records, None)
    if out.endswith(".jsonl"):
        with _appearing(Path(out)) as path, path.open("w", encoding="utf-8") as stream:
            return _write_lines(records, stream)
    with _appearing(Path(out)) as path:
        return _write_parquet(records, path)


def _rows(job: Job, patterns: list[str]) -> Iterator[Mapping[str, Any] | None]:
    sources = find_sources(patterns, job.data.format, "DATA", digests=False, task=job.task)
    check_asked(job, sources, "DATA")
    for unit in plan_units(sources):
        for _, fields in read_unit(unit, sources[unit.file], task_columns(job)):
            yield fields


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside the one that is wanted, which it becomes when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_lines(records: Iterable[Mapping[str, Any]], stream: TextIO | None) -> int:
    count = 0
    for record in records:
        print(json.dumps(record, ensure_ascii=False, default=str), file=stream)
        count += 1
    return count


def _write_parquet(records: Iterable[Mapping[str, Any]], path: Path) -> int:
    """The columns are those of the first ROWS_A_GROUP rows. Raises JobError where a later row does not fit them."""
    remaining, count, writer = iter(records), 0, None
    try:
        while group := list(islice(remaining, ROWS_A_GROUP)):
            if writer is None:
                names = dict.fromkeys([*(name for record in group for name in record), "prediction", "error"])
                table = pa.table({name: [record.get(name) for record in group] for name in names})
                fields = [
                    pa.field(one.name, pa.string() if pa.types.is_null(one.type) else one.type) for one in table.schema
                ]
                writer = pq.ParquetWriter(path, pa.schema(fields))
            unknown = {name for record in group for name in record} - set(writer.schema.names)
            try:
                if unknown:
                    raise pa.ArrowInvalid(f"no column {', '.join(sorted(unknown))}")
                writer.write_table(pa.Table.from_pylist([dict(record) for record in group], writer.schema))
            except pa.ArrowException as error:
                raise JobError(
                    f"rows {count:,} to {count + len(group):,} do not fit the columns of those before: {error}; "
                    "write a .jsonl file"
                ) from error
            count += len(group)
    finally:
        if writer is not None:
            writer.close()
    return count
