"""What can be done with a run that is already there: evaluate again, export a step, read its ledger."""

from dataclasses import replace
from pathlib import Path

import yaml

from orchestrator.evaluation.task import EvaluationRequest, evaluation_task
from orchestrator.planning.preflight import check_job
from orchestrator.ray_session import gpus_per_worker, ray_session
from orchestrator.terminal.progress import Screen
from trainers.checkpoint.export import export_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.evaluation.evaluate import evaluate_model
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.model.source import ModelFolder, find_model, prepare_model
from trainers.run.folder import Evaluation, checkpoints_folder, run_folder, step_name
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import load_shards
from trainers.shards.manifest import Shards, shards_folder
from trainers.storage import Folder


def evaluate_steps(job: Job, step: int | None, address: str | None, screen: Screen) -> list[Evaluation]:
    """Evaluate one step, or every committed one, again; the records replace the old ones.

    Raises:
        JobError: where the step is not committed.
    """
    request = _request(job, check_job(job))
    committed = committed_steps(checkpoints_folder(job, request.run))
    if step not in (None, 0, *committed):
        raise JobError(f"--step {step} is not committed in {request.run}; there are {committed}")
    steps = committed if step is None else [step]
    with ray_session(address) as ray, screen.live():
        request = replace(request, gpus=gpus_per_worker(job.scale, ray.cluster_resources()))
        task = evaluation_task(request)
        waiting = [task.remote(request, one) for one in steps]
        records = []
        for done, reference in enumerate(waiting, 1):
            records.append(ray.get(reference))
            screen.advance("evaluate", done, len(waiting), f"step {records[-1].step}")
    return records


def evaluate_folder(job: Job, model: Path) -> list[Evaluation]:
    """Evaluate any Hugging Face folder on the job's evaluation data, in this process. Nothing is written."""
    request = _request(job, check_job(job))
    task = job_task(job, request.train_shards)
    shards = ShardSet(request.eval_folder, request.eval_shards, task)
    rows, row_scores = evaluate_model(job, task, str(model), shards)
    key = request.eval_shards.key
    return [Evaluation(step=0, status="done", metrics=task.metrics(row_scores), eval_key=key, rows=len(rows))]


def _request(job: Job, model: ModelFolder) -> EvaluationRequest:
    shards = load_shards(job, model.path)
    if shards is None:
        raise JobError("the data is not sharded yet: run `tuneyard shard JOB` with the same job file first")
    folder = shards_folder(Folder(job.storage), shards.eval.key)
    return EvaluationRequest(job, model, shards.train, shards.eval, folder, run_folder(job, model.digest, shards))


def job_of_run(run: str) -> Job:
    """The job that a run folder belongs to. Raises JobError where it is none."""
    folder = Folder(str(Path(run).absolute()) if "://" not in run else run)
    try:
        return parse_job(yaml.safe_load(folder.read_bytes("job.yaml")), f"{folder}/job.yaml")
    except FileNotFoundError:
        raise JobError(f"{folder} is not a run folder: it has no job.yaml") from None


def shards_of_run(run: str) -> Shards:
    """The shards that a run was trained and evaluated on."""
    job = job_of_run(run)
    model = find_model(job)
    shards = load_shards(job, model.path) if model else None
    if shards is None:
        raise JobError(f"the shards of {run} are not there any more, or its data files have changed")
    return shards


def export_step(run: str, step: int, out: Path) -> Path:
    """Write one checkpoint of a run as a Hugging Face folder.

    Raises:
        JobError: where the step is not committed or the target is taken.
    """
    job = job_of_run(run)
    checkpoints = checkpoints_folder(job, Folder(str(Path(run).absolute())))
    committed = committed_steps(checkpoints)
    if step not in committed:
        raise JobError(f"--step {step} is not committed in {run}; there are {committed}")
    if out.exists() and any(out.iterdir()):
        raise JobError(f"--out {out} is not empty; name a new folder")
    task = job_task(job, shards_of_run(run).train)
    export_checkpoint(checkpoints / step_name(step), Folder(str(out.absolute())), job, task, prepare_model(job).path)
    return out
