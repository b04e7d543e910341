"""Whether checkpoints can be evaluated while the training runs. Pure."""

from collections.abc import Mapping

from trainers.errors import JobError
from trainers.job.schema import Job


def why_no_room(job: Job, gpus: int, resources: Mapping[str, float]) -> str | None:
    """Why no evaluation can run beside the training, or None.

    Args:
        gpus: GPUs per worker.
        resources: CPU and GPU of the whole cluster, as Ray counts them.
    """
    if not job.evaluate.while_training:
        return None
    each = {"CPU": job.scale.cpus_per_worker, "GPU": gpus}
    workers, evaluators = job.scale.max_workers, job.evaluate.workers
    full = [kind for kind, count in each.items() if resources.get(kind, 0) < count * (workers + evaluators)]
    if not full:
        return None
    kind = full[-1]
    return (
        f"{workers} workers take {workers * each[kind]:g} of {resources.get(kind, 0):g} {kind}s, and an evaluation "
        f"needs {evaluators * each[kind]:g}: no checkpoint can be evaluated while the training runs. Each is kept "
        "until it has been, as far as the disk allows"
    )


def check_room(job: Job, gpus: int, resources: Mapping[str, float]) -> str | None:
    """What the user should know of evaluations beside the training, or None.

    Raises:
        JobError: the job asks to stop early, which no evaluation could tell it.
    """
    problem = why_no_room(job, gpus, resources)
    if problem and job.evaluate.early_stopping:
        raise JobError(
            f"evaluate.early_stopping cannot act: {problem}. Lower scale.workers, add nodes, or leave it out"
        )
    return problem
