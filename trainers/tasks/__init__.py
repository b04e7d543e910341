"""The one extension point: a task says how a row becomes tensors, what the loss is and which metrics count.

To add a task, write one file like `classify.py`, add its fields to `trainers.job.TASK_FIELDS` and its class to `TASKS`.
Importing a task does not import torch: the data stage runs the same files without it.
"""

from trainers.tasks.base import Encoded, EncodeRules, Row, Sequence, Task, encode_rules
from trainers.tasks.classify import Classify
from trainers.tasks.extract import Extract
from trainers.tasks.mlm import Mlm
from trainers.tasks.options import DEFAULTS, TaskOptions, task_options
from trainers.tasks.pretrain import Pretrain
from trainers.tasks.seq2seq import Seq2Seq
from trainers.tasks.sft import Sft
from trainers.tasks.similarity import Similarity
from trainers.tasks.tag import Tag

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
    """The task of that name."""
    return TASKS[name](options)


__all__ = [
    "TASKS",
    "EncodeRules",
    "Encoded",
    "Row",
    "Sequence",
    "Task",
    "TaskOptions",
    "encode_rules",
    "load_task",
    "task_options",
]
