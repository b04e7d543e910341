"""`tuneyard export`: a checkpoint as a model folder, its adapter alone, or a quantized model that was judged."""

from pathlib import Path

from orchestrator.commands.find_run import find_job
from orchestrator.commands.past_run import best_step, shards_of
from orchestrator.commands.predict import find_model
from orchestrator.exporting.artefact import quantize
from orchestrator.exporting.verdict import Verdict
from trainers.checkpoint.adapter_export import export_adapter
from trainers.checkpoint.export import export_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.source import prepare_model
from trainers.quantization.forms import Quantization, check_form
from trainers.run.folder import checkpoints_folder, step_name
from trainers.run.record import find_run, job_task
from trainers.storage import Folder


def export_step(job: Job, run: Folder, step: int | None, out: Path, adapter: bool = False) -> int:
    """Write one checkpoint of a run, by default the best, as a Hugging Face folder. Returns its step.

    Args:
        adapter: its adapters alone, as PEFT stores them.

    Raises:
        JobError: where the step is not committed, the target is taken, or there are no adapters.
    """
    if adapter and job.model.lora is None:
        raise JobError(f"--adapter: {run} was trained without model.lora, so there is none; export it whole")
    checkpoints = checkpoints_folder(job, run)
    committed = committed_steps(checkpoints)
    step = best_step(run, checkpoints) if step is None else step
    if step not in committed:
        raise JobError(f"--step {step} is not committed in {run}; there are {committed}")
    if out.exists() and any(out.iterdir()):
        raise JobError(f"--out {out} is not empty; name a new folder")
    source = prepare_model(job).path
    task = job_task(job, shards_of(job, run).train, source)
    write = export_adapter if adapter else export_checkpoint
    write(checkpoints / step_name(step), Folder(str(out.absolute())), job, task, source)
    return step


def quantize_model(
    name: str, form: str, out: Path, storage: str, step: int | None, uri: str | None, allowance: float
) -> Verdict:
    """Write a quantized model, if the run's evaluation rows say that it lost no more than is allowed.

    Args:
        name: a run, an exported folder, or NAME[@VERSION].
        allowance: share of the metric's value that may be lost.

    Raises:
        JobError: where there is no such model, it cannot have the form, or the target is taken.
        EvaluationError: where it cannot be judged.
    """
    if out.exists():
        raise JobError(f"--out {out} exists; name a new folder")
    if not 0 <= allowance < 1:
        raise JobError(f"--allowance {allowance} is a share of the metric's value: from 0 to less than 1")
    _check_early(name, form, storage)
    model = find_model(name, storage, step, uri, [])
    run = find_run(model.job)
    task = run.load_task()
    check_form(form, run.job, task, model.path)
    return quantize(Quantization(form, Path(model.path), run.job, task), run, out, allowance)


def _check_early(name: str, form: str, storage: str) -> None:
    """Where a run is meant, refuse a form before its checkpoint is exported."""
    try:
        job, folder = find_job(name, storage)
    except JobError:
        return  # a model folder or a registered one; `find_model` says where it is neither
    source = prepare_model(job).path
    check_form(form, job, job_task(job, shards_of(job, folder).train, source), source)
