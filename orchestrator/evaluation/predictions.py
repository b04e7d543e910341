"""Predictions by several processes, each with the whole model: chunks of rows go to Ray actors in turn, and answers
come back in the rows' order. Chunks are those of a single process, so every byte is the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.ray_session import gpus_per_worker, ray_session
from trainers.errors import EvaluationError, TuneyardError
from trainers.evaluation.predict import Fields, Prediction, Predictor, chunks
from trainers.job.schema import Job
from trainers.model.world import hide_gpus

AHEAD = 2
"""Chunks that each process has at once, so that none waits for the reader."""
RETRIES = 2


class Worker:
    """One process; a chunk whose process died is done again by the next."""

    def __init__(self, job: Job, path: str, gpus: int) -> None:
        if gpus == 0:
            hide_gpus()
        self._predictor = Predictor(job, path)

    def say(self, rows: Sequence[Fields | None]) -> list[Prediction]:
        return list(self._predictor.say(rows))


def predict_on_workers(
    job: Job, path: str, rows: Iterable[Fields | None], workers: int, address: str | None
) -> Iterator[Prediction]:
    """As `trainers.evaluation.predict.predict`, by so many processes; 0: as many as there is room for."""
    with ray_session(address) as ray:
        gpus = gpus_per_worker(job.scale, ray.cluster_resources())
        started = [_start(ray, job, path, gpus) for _ in range(workers or _room(ray.available_resources(), job, gpus))]
        waiting: deque[Any] = deque()
        try:
            for number, chunk in enumerate(chunks(rows)):
                waiting.append(started[number % len(started)].say.remote(chunk))
                if len(waiting) >= AHEAD * len(started):
                    yield from ray.get(waiting.popleft())
            while waiting:
                yield from ray.get(waiting.popleft())
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # what the process itself raised
            if isinstance(cause, TuneyardError):
                raise cause from None
            raise EvaluationError(f"a process that predicts was lost: {str(error).splitlines()[0]}") from error
        finally:
            for worker in started:
                ray.kill(worker)


def _start(ray: Any, job: Job, path: str, gpus: int) -> Any:
    needs = {"num_cpus": job.scale.cpus_per_worker, "num_gpus": gpus}
    return ray.remote(Worker).options(**needs, max_restarts=RETRIES, max_task_retries=RETRIES).remote(job, path, gpus)


def _room(free: dict[str, float], job: Job, gpus: int) -> int:
    room = free.get("CPU", 0.0) // job.scale.cpus_per_worker
    return max(int(min(room, free.get("GPU", 0.0) // gpus) if gpus else room), 1)
