"""Whether workers can share a job's sequences (`train.sequence_parallel`): asked of the model's configuration."""

from trainers.architecture import DOCUMENTS
from trainers.errors import JobError
from trainers.job.schema import Job


def check_sharing(job: Job, model_path: str) -> None:
    """Ask the model without its weights.

    Args:
        job: with the attention backend that packing came to.

    Raises:
        JobError: where its sequences cannot be shared, and why.
    """
    ranks = job.train.sequence_parallel
    if ranks == 1:
        return
    if not job.packing or job.model.attention != DOCUMENTS:
        raise JobError(
            f"train.sequence_parallel: needs data.packing and model.attention {DOCUMENTS}, which tells documents by "
            f"their bounds; {job.model.path} has {job.model.attention} here. Leave out model.attention, or "
            "train.sequence_parallel where the model packs with no other"
        )
    from trainers.architecture.sequence_parallel import sharing_obstacle
    from trainers.model.model_size import build
    from trainers.tasks import load_task, task_options

    model = build(job, load_task(job.task, task_options(job)), model_path)
    problem = sharing_obstacle(model.config, model, ranks)
    if problem:
        raise JobError(
            f"train.sequence_parallel: {ranks} workers cannot share sequences of {job.model.path}: {problem}"
        )
