"""The packs of a job's epoch as they are trained, read from its shards."""

from dataclasses import dataclass

import numpy as np

from trainers.batching.packing import PackIndex, index_packs
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.records import Record
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import Splits, load_shards
from trainers.shards.manifest import shards_folder
from trainers.shards.shown import ShownRow, ShownSequence, show_sequence
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tokenizer.encoder import Encoder
from trainers.verification.packing import decide_packing, with_packing


class ShownPack(Record):
    """Documents that share a sequence."""

    pack: int
    """Its place in an epoch before the order is drawn, from 0."""
    documents: tuple[ShownSequence, ...]


@dataclass(frozen=True)
class Packs:
    """All packs of an epoch."""

    held: ShardSet
    index: PackIndex
    task: Task
    encoder: Encoder

    def show(self, number: int) -> ShownPack:
        """One pack. Raises JobError where there is none of that number."""
        if not 0 <= number < len(self.index):
            raise JobError(f"--pack {number}: an epoch has {len(self.index):,} packs, counted from 0")
        rows = self.index.pack(number).tolist()
        documents = tuple(show_sequence(self.held, row, self.task, self.encoder) for row in rows)
        return ShownPack(pack=number, documents=documents)

    def place(self, row: ShownRow) -> ShownRow:
        """A row with the packs that its sequences stand in."""
        places = np.flatnonzero(np.isin(self.index.rows, self.held.places(row.file, row.position)))
        packs = np.unique(np.searchsorted(self.index.offsets, places, side="right") - 1)
        return row.model_copy(update={"packs": tuple(packs.tolist())})


def open_packs(job: Job, model: ModelFolder, splits: Splits, encoder: Encoder) -> Packs:
    """The packs of a job.

    Raises:
        JobError: where it does not pack, or its shards are not written.
        DataError: where they are refused.
    """
    shards = load_shards(job, splits) if job.packing else None
    if job.packing and shards is None:
        raise JobError("--pack: which rows share a pack is known once the shards are written: `tuneyard shard JOB`")
    job = with_packing(job, decide_packing(job, model))
    if shards is None or not job.packing:
        raise JobError("--pack: this job does not pack, each sequence is a row: `--row` shows it")
    task = job_task(job, shards.train)
    task.prepare(encoder)
    held = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, task)
    return Packs(held, index_packs(job, held), task, encoder)
