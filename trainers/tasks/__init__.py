"""The one extension point: a task says how a row becomes tensors, what the loss is and which metrics count.

To add a task, write one file like `classify.py`, add its fields to `trainers.job.TASK_FIELDS` and its class to `TASKS`.
Importing a task does not import torch: the data stage runs the same files without it.
"""

from trainers.tasks.base import Encoded, EncodeRules, Row, Sequence, Task
from trainers.tasks.classify import Classify
from trainers.tasks.pretrain import Pretrain
from trainers.tasks.sft import Sft

TASKS: dict[str, type[Task]] = {"classify": Classify, "pretrain": Pretrain, "sft": Sft}


def load_task(name: str) -> Task:
    """The task of that name."""
    return TASKS[name]()


__all__ = ["TASKS", "EncodeRules", "Encoded", "Row", "Sequence", "Task", "load_task"]
