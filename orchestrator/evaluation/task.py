"""Evaluates checkpoints as Ray tasks, each on its own export, and leaves one record a step in the run folder.

Where a job asks for several evaluation workers, the task of a step shares its rows out among tasks of their own.
"""

import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from orchestrator.evaluation.one_gpu import ENVIRONMENT, on_own_gpu
from orchestrator.ray_session import ANYWHERE
from trainers.checkpoint.export import export_checkpoint
from trainers.errors import may_pass
from trainers.evaluation.device import computed_on
from trainers.evaluation.evaluate import (
    Measured,
    SetScores,
    done_evaluation,
    keep_scores,
    score_batches,
)
from trainers.evaluation.harness import harness_metrics
from trainers.evaluation.warm import keep_warm, open_warm
from trainers.model.world import hide_gpus, pick_device
from trainers.run.folder import Evaluation, failed_evaluation, step_name, write_evaluation
from trainers.run.record import Run
from trainers.storage import Folder

RETRIES = 2
"""Times a task is done again whose process died, or that could not read or write its storage."""
RETRY_PAUSE_S = 20.0


def evaluation_task(run: Run, gpus: int) -> Any:
    """`evaluate_step` as a Ray task, with so many GPUs a process. One that only waits for others lends Ray its core."""
    import ray

    if run.job.evaluate.workers > 1:
        return ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy=ANYWHERE)(evaluate_step)
    return _with_resources(run, gpus, evaluate_step)


def _with_resources(run: Run, gpus: int, function: Callable[..., Any], lasts: bool = True) -> Any:
    """A function as a Ray task that computes on the GPUs it gets and no others: of none Ray leaves all to be seen.

    Args:
        lasts: whether a process with one GPU takes more than one task. Those with several, over which a model may be
            spread, Ray ends after each; those without any last.
    """
    import ray

    needs: dict[str, Any] = {"num_cpus": run.job.scale.cpus_per_worker, "num_gpus": gpus}
    body = function
    if gpus == 0:
        body = partial(_without_gpus, function)
    elif gpus == 1 and lasts:
        body = partial(on_own_gpu, function)
        needs |= {"max_calls": 0, "runtime_env": {"env_vars": ENVIRONMENT}}

    @wraps(function)
    def task(*arguments: Any) -> Any:
        return body(*arguments)

    return ray.remote(**needs, max_retries=RETRIES, scheduling_strategy=ANYWHERE)(task)


def _without_gpus(function: Callable[..., Any], *arguments: Any) -> Any:
    hide_gpus()
    return function(*arguments)


def evaluate_step(run: Run, step: int, gpus: int = 0) -> Evaluation:
    """Export and evaluate one committed step, or the pretrained model for step 0. Commits evals/step-XXXXXXXX.json.

    A checkpoint that cannot be evaluated gives a record that says why; it is never chosen.
    """
    began, key = time.perf_counter(), run.shards.eval.key
    for attempt in range(1 + RETRIES):
        try:
            measured = _measure(run, step, gpus)
            record = done_evaluation(step, key, measured, time.perf_counter() - began)
            break
        except Exception as error:  # whatever the model or its metrics raise belongs into the record
            cause = getattr(error, "cause", None) or error  # Ray wraps that of a share
            record = failed_evaluation(step, key, cause)
            if attempt == RETRIES or not may_pass(cause):
                break
            time.sleep(RETRY_PAUSE_S * attempt)
    write_evaluation(run.folder, record)
    return record


def _measure(run: Run, step: int, gpus: int) -> Measured:
    task = run.load_task()
    path = str(export_step(run, step).path) if step else run.model.path
    shares = _score_all(run, path, gpus)
    alike = run.job.evaluate.workers == 1 or gpus == 0  # who only waits for others does not see their GPUs
    return keep_scores(run, task, step, shares, computed_on(pick_device(gpus)) if alike else "")


def harness_task(run: Run, gpus: int) -> Any:
    """`ask_harness` as a Ray task."""
    return _with_resources(run, gpus, ask_harness, lasts=False)


def ask_harness(run: Run, record: Evaluation) -> Evaluation:
    """Add the metrics of the job's lm-eval tasks to an evaluation, and commit it. Raises EvaluationError."""
    metrics, intervals, notes = harness_metrics(run.job, str(export_step(run, record.step).path))
    more: dict[str, dict[str, Any]] = {"metrics": metrics, "intervals": intervals, "notes": notes}
    record = record.model_copy(update={name: {**getattr(record, name), **values} for name, values in more.items()})
    write_evaluation(run.folder, record)
    return record


def export_step(run: Run, step: int) -> Folder:
    """The model folder of a committed step; written where it is not there yet."""
    out = run.folder / "export" / step_name(step)
    export_checkpoint(run.checkpoints / step_name(step), out, run.job, run.load_task(), run.model.path)
    return out


def _score_all(run: Run, path: str, gpus: int) -> list[SetScores]:
    """The scores of every worker's share of the rows."""
    workers = run.job.evaluate.workers
    if workers == 1:
        return [score(run, path, 0)]
    import ray

    task = _with_resources(run, gpus, score)
    shares: list[SetScores] = ray.get([task.remote(run, path, share) for share in range(workers)])
    return shares


def score(run: Run, path: str, share: int) -> SetScores:
    """Score one share of the rows with the model in folder `path`."""
    loaded, batches = open_warm(run, path)
    scores = score_batches(loaded, batches, share, run.job.evaluate.workers)
    keep_warm(run, path, loaded, batches)
    return scores
