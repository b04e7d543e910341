"""A few of a job's own rows as shards in a temporary folder, and the model that is tested on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.data.dataset import ShardSet
from trainers.data.formats import RawRow
from trainers.data.keys import manifest_of, plan_splits
from trainers.data.packing import PackIndex, one_row_each, pack_rows
from trainers.data.readers import plan_units, read_unit, task_columns
from trainers.data.shard_writer import write_shard
from trainers.data.tokenizer import load_encoder
from trainers.engine import load_options
from trainers.errors import DataError
from trainers.job import Job
from trainers.storage import Folder
from trainers.tasks import Task, encode_rules, load_task

ROWS = 48
LONGEST = 128
"""Tokens; longer rows are treated as the job's length policy has it, at this length."""


@dataclass(frozen=True)
class Specimen:
    """What the checks look at."""

    task: Task
    shards: ShardSet
    packs: PackIndex
    pad_id: int
    model: Any
    """fp32, in eval mode: dropout would hide what is looked for."""
    packing: bool
    seed: int


def take_specimen(job: Job, model_path: str, folder: Path) -> Specimen:
    """Write the first rows of the training data as a shard and load the model in fp32.

    Raises:
        DataError: where none of the rows can be used.
    """
    encoder = load_encoder(model_path, job.model.trust_remote_code)
    rules = replace(encode_rules(job), max_length=min(job.data.max_length, LONGEST))
    plain = replace(rules.options, label_smoothing=0.0, class_weights=None, dropout=None, generate=None)
    task = load_task(job.task, plain)
    plan, _ = plan_splits(job, model_path)
    record = write_shard(Folder(str(folder)), 0, 0, _first_rows(job, plan), task, encoder, rules).commit()
    if not record.rows:
        reasons = ", ".join(f"{name} ({count})" for name, count in record.outcomes.items())
        raise DataError(f"verify: none of the first {ROWS} training rows can be used: {reasons}")
    task = load_task(job.task, replace(plain, label_counts=record.labels))
    task.labels = tuple(record.labels)
    task.prepare(encoder)
    shards = ShardSet(Folder(str(folder)), manifest_of(plan, job.task, {0: record}), task)
    packs = pack_rows(shards.lengths, rules.max_length, 0) if job.packing else one_row_each(len(shards))
    model = load_fp32(job, task, model_path, encoder.pad_id)
    return Specimen(task, shards, packs, encoder.pad_id, model, job.packing, job.train.seed)


def load_fp32(job: Job, task: Task, path: str, pad_id: int) -> Any:
    """The model whole, fp32, in eval mode, its new parts the same each time."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of an engine in this process: it would partition the model
    torch.manual_seed(job.train.seed)
    options = {**load_options(job), "dtype": torch.float32}
    return task.load_model(path, pad_id=pad_id, **options).eval()


def _first_rows(job: Job, plan: Any) -> Iterator[RawRow]:
    units = plan_units(plan.sources)
    rows = (row for unit in units for row in read_unit(unit, plan.sources[unit.file], task_columns(job)))
    return islice(rows, ROWS)
