"""Checks a job against this machine before anything expensive starts; every problem is collected and raised once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.tracking.wandb_outlet import check_wandb
from trainers.errors import JobError
from trainers.evaluation.harness import check_harness
from trainers.job.draft import Checks, Draft
from trainers.job.load import read_draft
from trainers.job.schema import Job
from trainers.job.task_fields import names_folder
from trainers.model.choice import choose, settle
from trainers.model.deepspeed_config import derive_config
from trainers.model.fit import check_fit, check_long_sequences, check_teacher, tensor_shapes
from trainers.model.lora import check_frozen
from trainers.model.memory import ModelSize
from trainers.model.source import ModelFolder, find_teacher, prepare_model
from trainers.run.record import run_of
from trainers.shards.keys import Splits, find_split, load_shards, plan_splits, split_names, with_eval
from trainers.sources.files import SourceFile
from trainers.sources.readers import check_columns, needed_fields, task_columns
from trainers.storage import Folder
from trainers.tasks import check_measures, choose_metric
from trainers.training.continuing import check_same_ground, find_parent, has_begun
from trainers.verification.packing import PackingDecision, decide_packing, with_packing

METRIC = ("task", "evaluate.metric", "evaluate.mode", "evaluate.metrics")
BATCHES = ("scale.workers", "data.max_length", "train.global_batch_size", "train.micro_batch_size", "train.deepspeed",
           "train.compile", "train.activation_checkpointing", "train.activation_offload",
           "train.sequence_parallel")  # fmt: skip
ROWS = ("task", "data.format", "data.columns", "data.prompt")
MODEL = ("storage", "model.path", "model.revision", "model.gguf_file", "model.trust_remote_code", "train.distill")
LENGTHS = ("task", "data.max_length", "data.max_target_length", "data.chat_template")
DATA = ("task", "data")
TRAINED = ("name", "storage", "task", "model", "data", "train", "checkpoint", "evaluate")
"""Places of the job file that a check reads: where one is wrong, the check is passed over."""


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


def check_file(path: str | Path, overrides: Sequence[str] = (), weights: bool = True, runs: bool = False) -> CheckedJob:
    """Read a job file and check it as `check_job` does; what is wrong in the file hides nothing else.

    Args:
        runs: whether the storage must be able to hold a run.

    Raises:
        JobError: with every problem of the file and of the job, and what could not be checked.
        DataError: where a file of the data is not what its name says, and nothing else is wrong.
    """
    return _check(read_draft(path, overrides), weights, runs)


def check_job(job: Job, weights: bool = True) -> CheckedJob:
    """Check storage, model, data, batch arithmetic, DeepSpeed file, metric and registry; decide whether to pack where
    the job leaves that open.

    Args:
        job: the job.
        weights: whether a model folder without weights is refused; a plan needs its configuration alone.

    Raises:
        JobError: with every problem found.
        DataError: where a file is not what its name says, and nothing else is wrong.
    """
    return _check(Draft(job), weights)


def _check(draft: Draft, weights: bool, runs: bool = False) -> CheckedJob:
    job, check = draft.job, Checks(draft)
    if job is None:
        raise JobError(draft.problems, draft.where, ["all else"])
    check("storage", ["storage"], Folder(job.storage).check_writable)
    if runs:
        check("storage", ["storage"], lambda: check_run_storage(job))
    if (place := job.checkpoint.storage) is not None:
        check("checkpoint.storage", ["checkpoint.storage"], Folder(place).check_writable)
    check("the metric", METRIC, lambda: choose_metric(job))
    check("metrics and guards", [*METRIC, "evaluate.guards", "data.eval_sets"], lambda: check_measures(job))
    check("lm-eval", ["task", "evaluate.lm_eval"], lambda: check_harness(job))
    check("the registry", ["storage", "registry", "report_to"], lambda: check_registry(job))
    check("batch sizes", BATCHES, lambda: check_batches(job))
    found = {
        name: check(f"files of data.{name}", [f"data.{name}", *ROWS], partial(find_rows, job, name))
        for name in split_names(job)
    }
    sources = {name: files for name, files in found.items() if files is not None}
    model, notes = _check_model(job, check, weights)
    splits = None
    if model and len(sources) == len(found):
        splits = check("the data", DATA, lambda: plan_splits(job, model.path, with_eval(sources)))
    if model and splits and job.train.continue_from:
        begins = check("the run to go on from", TRAINED, partial(check_continued, job, model, splits))
        notes = (*notes, *(begins or ()))
    check.require()
    assert model is not None and splits is not None
    packing = decide_packing(job, model)
    settled = with_packing(job, packing)
    check_long_sequences(settled, model.path)
    return CheckedJob(settled, model, splits, packing, notes)


def _check_model(job: Job, check: Checks, weights: bool) -> tuple[ModelFolder | None, tuple[str, ...]]:
    """The prepared model, None where it was refused or not looked at, and what the user should know of it."""
    at_hand = names_folder(job.model.path) and job.model.gguf_file is None  # else it is downloaded or converted
    if check.problems and not at_hand:
        return None, ()
    model = check("the model", MODEL, lambda: prepare_model(job, weights))
    teacher = check("the teacher", ["storage", "train.distill"], lambda: find_teacher(job))
    if model is None:
        return None, ()
    if teacher:
        check("the teacher's vocabulary", LENGTHS, lambda: check_teacher(job, model.path, teacher))
    if tensor_shapes(Path(model.path)):
        check("frozen weights", ["model"], lambda: check_frozen(job, model.path))
    return model, tuple(
        check("the model's positions and vocabulary", LENGTHS, lambda: check_fit(job, model.path)) or ()
    )


def check_continued(job: Job, model: ModelFolder, splits: Splits) -> list[str]:
    """What is to know of a job that goes on from another run's checkpoint; nothing is asked of that once it has one of
    its own. Raises JobError with every problem."""
    asked = job.train.continue_from
    assert asked is not None
    job = with_packing(job, decide_packing(job, model))
    shards = load_shards(job, splits)
    if shards and has_begun(run_of(job, model, shards).checkpoints):
        return []
    parent = find_parent(job)
    if shards:
        check_same_ground(parent, model.digest, shards)
    told = ", ".join(f"{field} {was} -> {now}" for field, (was, now) in parent.changed.items())
    return [f"begins at step {asked.step} of {parent.folder}; from there on: {told or 'no change'}"]


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
            choice = choose(job, workers, None, lambda: ModelSize(0, 0, 0, 0))
            derive_config(settle(job, choice), choice.batches)
        except JobError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise JobError(list(problems))


def find_rows(job: Job, name: str) -> tuple[SourceFile, ...]:
    """The files of a split. Every one is there, is what its name says, and has the task's columns, or JobError."""
    sources, where = find_split(job, name), f"data.{name}"
    try:
        check_columns(sources, task_columns(job), needed_fields(job.task, job.data.prompt), where)
    except JobError as error:
        raise JobError([f"{where}: {problem}" for problem in error.problems]) from error
    return sources
