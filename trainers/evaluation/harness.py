"""Tasks of lm-eval, EleutherAI's harness, on an exported causal model. Its package is an extra: tuneyard[lm-eval]."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainers.errors import EvaluationError, JobError
from trainers.evaluation.bootstrap import Intervals
from trainers.job.schema import Job
from trainers.model.world import pick_device
from trainers.tasks import SET, load_task

NORMAL = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""
TASK_NAME = re.compile(r"^task:\s*[\"']?([\w./-]+)", re.MULTILINE)


def check_harness(job: Job) -> None:
    """Raises JobError where the job asks for lm-eval and cannot have it."""
    if not job.evaluate.lm_eval:
        return
    if not load_task(job.task).auto_class.endswith("CausalLM"):
        raise JobError(f"evaluate.lm_eval: its tasks ask causal models, and {job.task} trains none; leave it out")
    if find_spec("lm_eval") is None:
        raise JobError("evaluate.lm_eval: the package lm-eval is not installed: pip install 'tuneyard[lm-eval]'")
    harness_names(job.evaluate.lm_eval)


def harness_names(tasks: Sequence[str]) -> dict[str, str]:
    """The names of tasks; those given as YAML files say theirs. Raises JobError where one does not."""
    names = {}
    for task in tasks:
        if not task.endswith(".yaml"):
            names[task] = task
            continue
        try:
            found = TASK_NAME.search(Path(task).read_text(encoding="utf-8"))
        except OSError as error:
            raise JobError(f"evaluate.lm_eval: {task} cannot be read: {error.strerror}") from error
        if found is None:
            raise JobError(f"evaluate.lm_eval: {task} has no line `task: NAME`")
        names[task] = found[1]
    return names


def is_measured(job: Job, metrics: Mapping[str, float]) -> bool:
    """Whether metrics of every task are there."""
    there = {name.rpartition(SET)[2] for name in metrics if SET in name}
    return set(harness_names(job.evaluate.lm_eval).values()) <= there


def harness_metrics(job: Job, path: str) -> tuple[dict[str, float], Intervals, dict[str, str]]:
    """Metrics of the job's lm-eval tasks as METRIC@TASK; of each the interval, where the task has a standard error, and
    what makes it comparable.

    Args:
        path: an exported model folder.

    Raises:
        EvaluationError: where lm-eval knows no such task, or fails in one.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = harness_names(job.evaluate.lm_eval)
    folders = sorted({str(Path(task).parent) for task in names if task.endswith(".yaml")})
    manager = TaskManager(include_path=folders or None, include_defaults=any(task == names[task] for task in names))
    device = pick_device(job.scale.gpus_per_worker, job.scale.cpus_per_worker)
    trusted = job.model.trust_remote_code
    try:
        model = HFLM(pretrained=path, device=str(device), dtype=job.model.dtype,
                     batch_size=job.evaluate.batch_size, trust_remote_code=trusted)  # fmt: skip
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=list(names.values()), task_manager=manager, log_samples=False
        )
    except Exception as error:  # whatever a task's own files and code raise
        raise EvaluationError(f"evaluate.lm_eval: {type(error).__name__}: {error}") from error
    metrics: dict[str, float] = {}
    intervals: Intervals = {}
    notes = {}
    for task, values in found["results"].items():
        rows = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            name = f"{metric if kind == 'none' else key}{SET}{task}"
            metrics[name] = float(value)
            spread = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(spread, float) and math.isfinite(spread)
            if known:
                intervals[name] = (value - NORMAL * spread, value + NORMAL * spread)
            told = f"standard error {spread:.4g}" if known else "no standard error and so no interval"
            version = found.get("versions", {}).get(task)
            notes[name] = f"lm-eval {lm_eval.__version__}, version {version} of the task, {rows} rows, {told}"
    return metrics, intervals, notes
