"""The one extension point: a task says how a row becomes tensors, what the loss is and which metrics count.

To add a task, write one file like `classify.py`, add its fields to `trainers.job.schema.TASK_FIELDS` and its class to
`TASKS`. Importing a task does not import torch: the data stage runs the same files without it.
"""

from typing import Literal

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.tasks.base import EncodeRules, Example, Task, encode_rows, encode_rules
from trainers.tasks.classify import Classify
from trainers.tasks.extract import Extract
from trainers.tasks.mlm import Mlm
from trainers.tasks.options import DEFAULTS, TaskOptions, task_options
from trainers.tasks.pretrain import Pretrain
from trainers.tasks.seq2seq import Seq2Seq
from trainers.tasks.sft import Sft
from trainers.tasks.similarity import Similarity
from trainers.tasks.tag import Tag

Mode = Literal["min", "max"]

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "extract": Extract,
    "mlm": Mlm,
    "pretrain": Pretrain,
    "seq2seq": Seq2Seq,
    "sft": Sft,
    "similarity": Similarity,
    "tag": Tag,
}


def load_task(name: str, options: TaskOptions = DEFAULTS) -> Task:
    return TASKS[name](options)


def choose_metric(job: Job) -> tuple[str, Mode]:
    """The metric that decides and its direction. Raises JobError where the task does not know it."""
    task = load_task(job.task)
    metric = job.evaluate.metric or task.metric
    if metric not in task.metrics_known:
        raise JobError(f"evaluate.metric: task {job.task} gives {', '.join(task.metrics_known)}, not {metric!r}")
    return metric, job.evaluate.mode or ("min" if task.better_mode(metric) == "min" else "max")


__all__ = [
    "TASKS",
    "EncodeRules",
    "Example",
    "Mode",
    "Task",
    "TaskOptions",
    "choose_metric",
    "encode_rows",
    "encode_rules",
    "load_task",
    "task_options",
]
