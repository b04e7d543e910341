"""What one run is: its job, model, shards and folder."""

from dataclasses import dataclass, replace

from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.shards.manifest import ShardManifest
from trainers.storage import Folder
from trainers.tasks import Task, load_task, task_options


@dataclass(frozen=True)
class TrainRequest:
    """All a rank needs to know; small enough to travel."""

    job: Job
    model: ModelFolder
    train_shards: ShardManifest
    shards_folder: Folder
    run: Folder


def job_task(job: Job, shards: ShardManifest) -> Task:
    """The job's task, knowing the labels of the training data."""
    task = load_task(job.task, replace(task_options(job), label_counts=shards.labels))
    task.labels = tuple(shards.labels)
    return task
