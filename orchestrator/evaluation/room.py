"""Where checkpoints are evaluated while the training runs: on devices that are free, or by the ranks. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.memory import GIB, MARGIN, RESERVE_BYTES


@dataclass(frozen=True)
class Place:
    """Where evaluations run, and why."""

    on: Literal["free", "ranks"]
    reason: str
    is_possible: bool = True
    """False where the job names a place that there is not."""

    def __str__(self) -> str:
        who = "the ranks evaluate between two steps" if self.on == "ranks" else "evaluations run beside the training"
        return f"{who}: {self.reason}"


FREE = "there is a free device for them"


def place_evaluations(
    job: Job, gpus: int, resources: Mapping[str, float], weight_bytes: int = 0, device_bytes: int | None = None
) -> Place:
    """Settle `evaluate.on`.

    Args:
        gpus: GPUs per worker.
        resources: CPU and GPU of the whole cluster, as Ray counts them.
        weight_bytes: of the model in its working type.
        device_bytes: memory of the smallest GPU; None where the model is computed on CPUs.
    """
    if not job.evaluate.while_training:
        return Place("free", "only after it, for evaluate.while_training is off")
    if job.evaluate.on == "ranks":
        return Place("ranks", "named by the job")
    no_device = why_no_device(weight_bytes, device_bytes)
    problem = no_device or why_no_room(job, gpus, resources)
    if job.evaluate.on == "auto" and (why := problem or why_shared(job)):
        return Place("ranks", why)
    return Place("free", problem or FREE, not problem)


def why_no_device(weight_bytes: int, device_bytes: int | None) -> str | None:
    """Why no single device holds the model, or None."""
    need = int(weight_bytes * (1 + MARGIN)) + RESERVE_BYTES
    if device_bytes is None or need <= device_bytes:
        return None
    return f"the whole model needs {need / GIB:.1f} GiB of a device, and one has {device_bytes / GIB:.1f}"


def why_shared(job: Job) -> str | None:
    """Why a device may not hold an evaluation's sequence, or None."""
    ranks = job.train.sequence_parallel
    return f"{ranks} workers share each sequence, which one device would have whole" if ranks > 1 else None


def why_no_room(job: Job, gpus: int, resources: Mapping[str, float]) -> str | None:
    """Why no evaluation can run beside the training, or None."""
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
        f"needs {evaluators * each[kind]:g}"
    )


def check_room(job: Job, place: Place) -> str | None:
    """What the user should know of the place, or None.

    Raises:
        JobError: the job asks to stop early, which no evaluation could tell it.
    """
    if place.on == "ranks":
        return str(place)
    if place.is_possible:
        return None
    if job.evaluate.early_stopping:
        raise JobError(
            f"evaluate.early_stopping cannot act: {place.reason}. Set evaluate.on: ranks, lower scale.workers, or add "
            "nodes"
        )
    return (
        f"{place.reason}: no checkpoint can be evaluated while the training runs (evaluate.on: ranks could). Each is "
        "kept until it has been, as far as the disk allows"
    )
