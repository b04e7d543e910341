"""The one extension point: a task says how a row becomes tensors, what the loss is and which metrics count.

To add a task, write one file like `classify.py`, add its fields to `trainers.job.schema.TASK_FIELDS` and its class to
`TASKS`. Importing a task does not import torch: the data stage runs the same files without it.
"""

import math
from collections.abc import Mapping
from typing import Literal

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.tasks.base import EncodeRules, Example, Task, encode_rules
from trainers.tasks.classify import Classify
from trainers.tasks.encoded import encode_rows
from trainers.tasks.extract import Extract
from trainers.tasks.metrics.own import load_metric
from trainers.tasks.mlm import Mlm
from trainers.tasks.options import DEFAULTS, TaskOptions, task_options
from trainers.tasks.pretrain import Pretrain
from trainers.tasks.seq2seq import Seq2Seq
from trainers.tasks.sft import Sft
from trainers.tasks.similarity import Similarity
from trainers.tasks.tag import Tag

Mode = Literal["min", "max"]

SET = "@"
"""METRIC@NAME is a metric over another evaluation set than the deciding one."""

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


def _task_of(job: Job) -> Task:
    data, train, evaluate = job.data, job.train, job.evaluate
    options = TaskOptions(metrics=evaluate.metrics, generate=evaluate.generate, multi_label=data.multi_label,
                          objective=train.objective)  # fmt: skip
    return load_task(job.task, options)


def choose_metric(job: Job) -> tuple[str, Mode]:
    """The metric that decides and its direction. Raises JobError where the task does not know it."""
    task = _task_of(job)
    metric = job.evaluate.metric or task.metric
    if metric not in task.metrics_named:
        raise JobError(f"evaluate.metric: task {job.task} gives {', '.join(task.metrics_named)}, not {metric!r}")
    return metric, job.evaluate.mode or ("min" if task.better_mode(metric) == "min" else "max")


def check_measures(job: Job) -> None:
    """Raises JobError where the metric that decides or a guard's is one that the job's other choices leave out, where a
    metric of the job's own has a name that is taken or is not there, or where a guard names a metric or an evaluation
    set that there is not."""
    task, problems = _task_of(job), []
    known, wanted = task.metrics_named, [("evaluate.metric", job.evaluate.metric or task.metric)]
    wanted += [(f"evaluate.guards.{guard}", guard.partition(SET)[0]) for guard in job.evaluate.guards]
    for field, metric in wanted:
        if why := task.left_out(metric) if metric in task.metrics_known else None:
            problems.append(f"{field}: there is no {metric} in this job: {why}")
    for name, own in job.evaluate.metrics.items():
        if name in task.metrics_known:
            problems.append(f"evaluate.metrics.{name}: task {job.task} has a metric of that name; choose another")
        try:
            load_metric(name, own.function)
        except JobError as error:
            problems += error.problems
    for guard in job.evaluate.guards:
        metric, at, name = guard.partition(SET)
        if metric not in known:
            problems.append(f"evaluate.guards: task {job.task} gives {', '.join(known)}, not {metric!r}")
        if at and name not in job.data.eval_sets:
            there = ", ".join(job.data.eval_sets) or "none"
            problems.append(f"evaluate.guards.{guard}: data.eval_sets has no {name!r}; there are {there}")
    if problems:
        raise JobError(problems)


def guard_margins(job: Job, metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much each guarded metric is better than its guard: below 0 where it is worse, nan where it is missing."""
    task = _task_of(job)
    return {
        name: (metrics.get(name, math.nan) - limit) * (1 if task.better_mode(name.partition(SET)[0]) == "max" else -1)
        for name, limit in job.evaluate.guards.items()
    }


__all__ = [
    "SET",
    "TASKS",
    "EncodeRules",
    "Example",
    "Mode",
    "Task",
    "TaskOptions",
    "check_measures",
    "choose_metric",
    "encode_rows",
    "encode_rules",
    "guard_margins",
    "load_task",
    "task_options",
]
