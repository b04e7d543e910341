"""A few of a job's own rows as shards in a temporary folder, and the model that is tested on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trainers.architecture import distinct_layers
from trainers.batching.packing import PackIndex, one_row_each, pack_rows
from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.model.engine import load_options
from trainers.pretrained import weight_files
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import SplitPlan, manifest_of
from trainers.shards.manifest import ShardRecord
from trainers.shards.writer import write_shard
from trainers.sources.files import find_sources
from trainers.sources.formats import RawRow
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.storage import Folder
from trainers.tasks import EncodeRules, Task, encode_rules, load_task
from trainers.tasks.labels import head_labels, name_labels
from trainers.tokenizer.encoder import Encoder, load_encoder

ROWS, ROWS_PACKED = 48, 12
"""Rows of a sample as read; where they are split and packed, few make many documents."""
LEAST = 8
"""Sequences that they should give."""
ALONE, PACKED, PACK = 64, 32, 3
"""Longest row in tokens, alone and packed; longer ones are treated as the job's length policy has it, at this length.
A pack holds at least so many rows."""
LOOKED_AT = 2400
"""Rows that are looked at before a longer length is tried, where too few can be used."""
WHOLE_BYTES, WHOLE_BYTES_ON_CPU = 2 * 2**30, 2**28
"""Of models with more bytes of weights only as many layers are looked at as hold every kind of layer: depth changes
neither masks nor losses."""


@dataclass(frozen=True)
class CheckContext:
    """What the checks look at."""

    task: Task
    shards: ShardSet
    packs: PackIndex
    pad_id: int
    model: Any
    """In eval mode: dropout would hide what is looked for."""
    device: Any
    """torch.device of the model."""
    packing: bool
    seed: int
    layers: int | None = None
    """Layers of the model that were loaded; None: all."""

    @property
    def is_half(self) -> bool:
        """Whether the model computes in bf16, because its attention backend knows nothing else."""
        return str(self.model.dtype) == "torch.bfloat16"


def make_context(job: Job, model_path: str, folder: Path, device: Any = "cpu") -> CheckContext:
    """Write the first usable rows of the training data as a shard and load the model.

    Raises:
        DataError: where none of the rows can be used.
    """
    encoder = load_encoder(model_path, job.model.trust_remote_code)
    rules = encode_rules(job)
    without = {"label_smoothing": 0.0, "class_weights": None, "dropout": None, "generate": None}
    plain = rules.options.model_copy(update=without)
    sources = find_sources(job.data.train_paths, job.data.format, "data.train", digests=False, task=job.task)
    plan = SplitPlan("train", sources, None, {})
    task = load_task(job.task, plain)
    longest, record = _first_shard(job, plan, Folder(str(folder)), task, encoder, rules)
    task = load_task(job.task, plain.model_copy(update={"label_counts": record.labels, "label_rows": record.rows}))
    name_labels(task, record.labels if head_labels(model_path, task) else _labels(record), model_path)
    task.prepare(encoder)
    shards = ShardSet(Folder(str(folder)), manifest_of(plan, job.task, {0: record}), task)
    packs = pack_rows(shards.lengths, PACK * longest, 0) if job.packing else one_row_each(len(shards))
    most = WHOLE_BYTES_ON_CPU if torch.device(device).type == "cpu" else WHOLE_BYTES
    layers = None
    if weight_bytes(model_path) > most:
        layers = distinct_layers(task.load_config(model_path, encoder.pad_id, job.model.trust_remote_code))
    model = _load(job, task, model_path, encoder.pad_id, layers, device)
    return CheckContext(task, shards, packs, encoder.pad_id, model, device, job.packing, job.train.seed, layers)


def _labels(record: ShardRecord) -> tuple[str, ...]:
    """Labels of the rows; two at least where there are labels, as a single class is another kind of head."""
    labels = tuple(record.labels)
    return (*labels, f"not {labels[0]}") if len(labels) == 1 else labels


def weight_bytes(model_path: str) -> int:
    """Size of a model folder's weights."""
    return sum(file.stat().st_size for file in weight_files(Path(model_path)))


def _load(job: Job, task: Task, path: str, pad_id: int, layers: int | None, device: Any) -> Any:
    """The model unpartitioned, its new parts the same each time; in fp32 unless its attention backend cannot."""
    torch.manual_seed(job.train.seed)
    half = job.model.attention.startswith("flash")
    options = {**load_options(job), "dtype": torch.bfloat16 if half else torch.float32}
    return task.load_model(path, pad_id=pad_id, layers=layers, **options).eval().to(device)


def _first_shard(
    job: Job, plan: SplitPlan, folder: Folder, task: Task, encoder: Encoder, rules: EncodeRules
) -> tuple[int, ShardRecord]:
    """The first rows of use as a shard, and the longest sequence allowed: short, unless too few rows are of use so."""
    longest, least, outcomes = min(job.data.max_length, PACKED if job.packing else ALONE), LEAST, ""
    while True:
        rows, count = _rows(job, plan), ROWS_PACKED if job.packing else ROWS
        for _ in range(LOOKED_AT // count):
            some = list(islice(rows, count))
            if not some:
                break
            record = write_shard(folder, 0, 0, some, task, encoder, replace(rules, max_length=longest)).commit()
            if record.rows >= least:
                return longest, record
            outcomes = ", ".join(f"{name} ({count})" for name, count in record.outcomes.items())
        if longest == job.data.max_length:
            if least == 1:
                raise DataError(
                    f"verify: none of the first {LOOKED_AT:,} training rows can be used: {outcomes}; "
                    "train.verify: false trains without these tests"
                )
            least = 1
        longest = min(2 * longest, job.data.max_length)


def _rows(job: Job, plan: SplitPlan) -> Iterator[RawRow]:
    units = plan_units(plan.sources)
    return (row for unit in units for row in read_unit(unit, plan.sources[unit.file], task_columns(job)))
