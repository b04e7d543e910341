"""Checks a job against this machine before anything expensive starts; every problem is collected and raised once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.tracking.wandb_outlet import check_wandb
from trainers.batching.batch_plan import plan_batches
from trainers.errors import JobError
from trainers.evaluation.harness import check_harness
from trainers.job.schema import Job
from trainers.job.task_fields import names_folder
from trainers.model.choice import choose, settle
from trainers.model.deepspeed_config import derive_config
from trainers.model.fit import check_fit, check_teacher, tensor_shapes
from trainers.model.lora import check_frozen
from trainers.model.memory import ModelSize
from trainers.model.source import ModelFolder, find_teacher, prepare_model
from trainers.shards.keys import Sources, Splits, plan_splits, split_sources
from trainers.sources.readers import check_columns, needed_fields, task_columns
from trainers.storage import Folder
from trainers.tasks import check_measures, choose_metric
from trainers.verification.packing import PackingDecision, decide_packing, with_packing


@dataclass(frozen=True)
class CheckedJob:
    """A job that passed its checks, with what they had to read: the stages read none of it again."""

    job: Job
    model: ModelFolder
    splits: Splits
    packing: PackingDecision | None = None
    """Found out where the job leaves it open whether to pack."""
    notes: tuple[str, ...] = ()
    """What the user should know although it is no error."""


def check_job(job: Job, weights: bool = True) -> CheckedJob:
    """Check storage, model, data, batch arithmetic, DeepSpeed file, metric and registry; decide whether to pack where
    the job leaves that open.

    Args:
        job: the job.
        weights: whether a model folder without weights is refused; a plan needs its configuration alone.

    Raises:
        JobError: with every problem found.
        DataError: where a file is not what its name says.
    """
    problems: list[str] = []

    def check(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except JobError as error:
            problems.extend(error.problems)
            return None

    check(Folder(job.storage).check_writable)
    if job.checkpoint.storage is not None:
        check(Folder(job.checkpoint.storage).check_writable)
    check(lambda: choose_metric(job))
    check(lambda: check_measures(job))
    check(lambda: check_harness(job))
    check(lambda: check_registry(job))
    check(lambda: check_batches(job))
    sources: Sources | None = check(lambda: find_data(job))
    at_hand = names_folder(job.model.path) and job.model.gguf_file is None  # else it is downloaded or converted
    model: ModelFolder | None = check(lambda: prepare_model(job, weights)) if at_hand or not problems else None
    teacher = check(lambda: find_teacher(job)) if at_hand or not problems else None
    if model and teacher:
        check(lambda: check_teacher(job, model.path, teacher))
    notes: list[str] | None = check(lambda: check_fit(job, model.path)) if model else []
    if model and tensor_shapes(Path(model.path)):
        check(lambda: check_frozen(job, model.path))
    splits = check(lambda: plan_splits(job, model.path, sources)) if model and sources else None
    if problems or model is None or splits is None:
        raise JobError(list(dict.fromkeys(problems)))
    packing = decide_packing(job, model)
    return CheckedJob(with_packing(job, packing), model, splits, packing, tuple(notes or ()))


def check_run_storage(job: Job) -> None:
    """A run folder is appended to, locked and mapped. Raises JobError where its place knows none of these."""
    if not Folder(job.storage).is_local:
        raise JobError(
            f"storage: {job.storage} can hold data and shards, but not a run, whose log is appended to and whose "
            "folder is locked; name a folder that all nodes share, and put the checkpoints there: checkpoint.storage: "
            f"{job.storage}"
        )


def check_registry(job: Job) -> None:
    """A registry is named, or storage can hold one, and who follows the run is installed. Raises JobError."""
    if "wandb" in job.report_to:
        check_wandb()
    registry_uri(job.storage, job.registry.uri)


def check_batches(job: Job) -> None:
    """The global batch must divide at the smallest and the largest world size (others that do not are passed over), and
    the DeepSpeed file must agree.

    Raises:
        JobError: naming the sizes that would do.
    """
    problems: dict[str, None] = {}
    for workers in sorted({job.scale.min_workers, job.scale.max_workers}):
        try:
            batches = plan_batches(
                job.train.global_batch_size, job.train.micro_batch_size, workers, job.data.max_length
            )
            derive_config(settle(job, choose(job, workers, None, lambda: ModelSize(0, 0, 0, 0))), batches)
        except JobError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise JobError(list(problems))


def find_data(job: Job) -> Sources:
    """The files of all splits. Every one is there, is what its name says, and has the task's columns, or JobError."""
    sources = split_sources(job)
    problems: list[str] = []
    for name in (name for name in sources if name != "eval" or not job.data.eval_fraction):
        where = f"data.{name}"
        try:
            check_columns(sources[name], task_columns(job), needed_fields(job.task, job.data.prompt), where)
        except JobError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise JobError(problems)
    return sources
