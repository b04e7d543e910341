"""Evaluates checkpoints as Ray tasks, each on its own export, and leaves one record a step in the run folder.

Where a job asks for several evaluation workers, the task of a step shares its rows out among tasks of their own.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.run.folder import Evaluation, checkpoints_folder, step_name
from trainers.run.row_scores import write_row_scores
from trainers.shards.manifest import ShardManifest
from trainers.storage import Folder

if TYPE_CHECKING:
    from trainers.evaluation.evaluate import RowScores
    from trainers.shards.dataset import ShardSet

RETRIES = 2
"""Times Ray starts a task again whose process died."""


@dataclass(frozen=True)
class EvaluationRequest:
    """All that the evaluation of any checkpoint of a run needs."""

    job: Job
    model: ModelFolder
    train_shards: ShardManifest
    eval_shards: ShardManifest
    eval_folder: Folder
    run: Folder
    gpus: int = 0
    """GPUs of each process."""


def evaluation_task(request: EvaluationRequest) -> Any:
    """`evaluate_step` as a Ray task. One that only waits for others lends Ray its core meanwhile."""
    import ray

    if request.job.evaluate.workers > 1:
        return ray.remote(num_cpus=1, max_retries=RETRIES)(evaluate_step)
    return _with_resources(request)(evaluate_step)


def _with_resources(request: EvaluationRequest) -> Any:
    import ray

    cpus = request.job.scale.cpus_per_worker
    return ray.remote(num_cpus=cpus, num_gpus=request.gpus, max_retries=RETRIES)


def evaluate_step(request: EvaluationRequest, step: int) -> Evaluation:
    """Export and evaluate one committed step, or the pretrained model for step 0. Commits evals/step-XXXXXXXX.json.

    A checkpoint that cannot be evaluated gives a record that says why; it is never chosen.
    """
    began = time.perf_counter()
    try:
        metrics, notes, rows = _measure(request, step)
        record = Evaluation(step=step, status="done", metrics=metrics, notes=notes, eval_key=request.eval_shards.key,
                            rows=rows, seconds=time.perf_counter() - began)  # fmt: skip
    except Exception as error:  # whatever the model or its metrics raise belongs into the record
        record = Evaluation(
            step=step, status="failed", error=f"{type(error).__name__}: {error}", eval_key=request.eval_shards.key
        )
    write_evaluation(request.run, record)
    return record


def write_evaluation(run: Folder, record: Evaluation) -> None:
    """Commit a record."""
    (run / "evals").write_bytes(f"{step_name(record.step)}.json", record.model_dump_json(indent=1).encode())


def _measure(request: EvaluationRequest, step: int) -> tuple[dict[str, float], dict[str, str], int]:
    from trainers.evaluation.evaluate import combine

    task, shards = _opened(request)
    path = request.model.path if step == 0 else _export(request, step, task)
    rows, row_scores = combine(task, _score_all(request, path), len(shards.lengths))
    write_row_scores(request.run, step, rows, row_scores, task.labels)
    metrics = task.metrics(row_scores)
    return metrics, {name: note for name, note in task.notes().items() if name in metrics}, len(rows)


def _score_all(request: EvaluationRequest, path: str) -> "list[RowScores]":
    """What each worker says of its share."""
    workers = request.job.evaluate.workers
    if workers == 1:
        return [score(request, path, 0)]
    import ray

    task = _with_resources(request)(score)
    found: list[RowScores] = ray.get([task.remote(request, path, share) for share in range(workers)])
    return found


def score(request: EvaluationRequest, path: str, share: int) -> "RowScores":
    """One share of the rows, by the model in folder `path`."""
    from trainers.evaluation.evaluate import score_share

    task, shards = _opened(request)
    return score_share(request.job, task, path, shards, share, request.job.evaluate.workers)


def _opened(request: EvaluationRequest) -> "tuple[Any, ShardSet]":
    from trainers.run.record import job_task
    from trainers.shards.dataset import ShardSet

    task = job_task(request.job, request.train_shards)
    return task, ShardSet(request.eval_folder, request.eval_shards, task)


def _export(request: EvaluationRequest, step: int, task: Any) -> str:
    from trainers.checkpoint.export import export_checkpoint

    out = request.run / "export" / step_name(step)
    checkpoint = checkpoints_folder(request.job, request.run) / step_name(step)
    export_checkpoint(checkpoint, out, request.job, task, request.model.path)
    return str(out.path)


def read_evaluations(run: Folder, eval_key: str) -> list[Evaluation]:
    """Committed records over these evaluation shards, by step."""
    names = [name for name in (run / "evals").list() if name.endswith(".json")]
    records = [Evaluation.model_validate_json((run / "evals").read_bytes(name)) for name in names]
    return [record for record in records if record.eval_key == eval_key]
