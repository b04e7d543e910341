"""What one run is: its job, model, shards and folder. Torch-free; stages, ranks and evaluations all get this record."""

from typing import Literal

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.source import ModelFolder, find_model
from trainers.records import Record
from trainers.run.folder import SHARDS, checkpoints_folder, run_folder
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import Splits, load_shards, plan_splits
from trainers.shards.manifest import ShardManifest, Shards, shards_folder
from trainers.storage import Folder
from trainers.tasks import Task, load_task, task_options
from trainers.tasks.labels import name_labels


class Run(Record):
    """One run; small enough to travel, as JSON or between Ray's processes."""

    job: Job
    model: ModelFolder
    shards: Shards
    folder: Folder
    until: int | None = None
    """Pause, committed and evaluated, after this step; None trains to the last. No part of what the run is."""

    @property
    def checkpoints(self) -> Folder:
        """Where the checkpoints are."""
        return checkpoints_folder(self.job, self.folder)

    def evaluated_on(self, place: Literal["free", "ranks"]) -> "Run":
        """The same run with `evaluate.on` settled."""
        evaluate = self.job.evaluate.model_copy(update={"on": place})
        return self.model_copy(update={"job": self.job.model_copy(update={"evaluate": evaluate})})

    def note_shards(self) -> None:
        """Leave the keys of its shards in the run folder."""
        self.folder.write_json(SHARDS, [manifest.key for manifest in self.shards.all])

    def load_task(self) -> Task:
        """The job's task, knowing the labels of the training data."""
        return job_task(self.job, self.shards.train, self.model.path)

    def open_held(self, task: Task) -> dict[str, ShardSet]:
        """The sequences of every evaluation set by name; the deciding one first, without a name."""
        return {name: self._open(manifest, task) for name, manifest in self.shards.held.items()}

    def open_shards(self, split: Literal["train", "eval"], task: Task) -> ShardSet:
        """The sequences of a split."""
        return self._open(self.shards.train if split == "train" else self.shards.eval, task)

    def _open(self, manifest: ShardManifest, task: Task) -> ShardSet:
        return ShardSet(shards_folder(Folder(self.job.storage), manifest.key), manifest, task)


def run_of(job: Job, model: ModelFolder, shards: Shards) -> Run:
    """The run of a job on these shards, in the folder that its identity names."""
    return Run(job=job, model=model, shards=shards, folder=run_folder(job, model.digest, shards))


def find_run(job: Job, model: ModelFolder | None = None, splits: Splits | None = None) -> Run:
    """The run of a job whose shards are written.

    Args:
        job: the job.
        model: its prepared model, where the caller has it.
        splits: its splits, where the caller has read the sources.

    Raises:
        JobError: where they are not.
        DataError: where the job refuses what they hold.
    """
    model = model or find_model(job)
    shards = load_shards(job, splits or plan_splits(job, model.path)) if model else None
    if model is None or shards is None:
        raise JobError("the data is not sharded yet: run `tuneyard shard JOB` with the same job file first")
    return run_of(job, model, shards)


def job_task(job: Job, shards: ShardManifest, model_path: str | None = None) -> Task:
    """The job's task, knowing the labels of the training data, in the order of the model's head if it has one.

    Raises:
        JobError: where that head knows other labels.
    """
    counted = {"label_counts": shards.labels, "label_rows": shards.total("rows")}
    task = load_task(job.task, task_options(job).model_copy(update=counted))
    name_labels(task, shards.labels, model_path)
    return task
