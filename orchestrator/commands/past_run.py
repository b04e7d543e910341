"""What can be done with a run that is already there: evaluate again, export a step, read its ledger."""

from pathlib import Path
from typing import Any

from orchestrator.evaluation.task import evaluation_task, harness_task
from orchestrator.planning.preflight import check_job
from orchestrator.ray_session import gpus_per_worker, ray_session
from orchestrator.terminal.progress import Screen
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.evaluation.device import computed_on
from trainers.evaluation.evaluate import evaluate_model, measure_sets
from trainers.evaluation.harness import check_harness
from trainers.evaluation.row_views import RowView, costliest_rows
from trainers.evaluation.selection import find_best
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.model.world import pick_device
from trainers.run.folder import Evaluation, RunResult, read_evaluations
from trainers.run.record import find_run, job_task
from trainers.run.row_scores import row_scores_name
from trainers.shards.keys import load_shards, plan_splits
from trainers.shards.manifest import Shards
from trainers.storage import Folder
from trainers.tasks import choose_metric


def evaluate_steps(job: Job, step: int | None, address: str | None, screen: Screen) -> list[Evaluation]:
    """Evaluate one step, or every committed one, again; the records replace the old ones.

    Raises:
        JobError: where the step is not committed.
    """
    checked = check_job(job)
    run = find_run(checked.job, checked.model, checked.splits)
    committed = committed_steps(run.checkpoints)
    if step not in (None, 0, *committed):
        raise JobError(f"--step {step} is not committed in {run.folder}; there are {committed}")
    steps = committed if step is None else [step]
    with ray_session(address) as ray, screen.live():
        gpus = gpus_per_worker(job.scale, ray.cluster_resources())
        task = evaluation_task(run, gpus)
        waiting = [task.remote(run, each, gpus) for each in steps]
        records = []
        for done, reference in enumerate(waiting, 1):
            records.append(ray.get(reference))
            screen.advance("evaluate", done, len(waiting), f"step {records[-1].step}")
    return records


def ask_tasks(job: Job, tasks: list[str], step: int | None, address: str | None, screen: Screen) -> list[Evaluation]:
    """Put lm-eval tasks to a step, by default the best; its record holds the metrics from then on."""
    evaluate = job.evaluate.model_copy(update={"lm_eval": tuple(tasks)})
    job = job.model_copy(update={"evaluate": evaluate})
    check_harness(job)
    run = find_run(job)
    known = {one.step: one for one in read_evaluations(run.folder, run.shards.eval.key) if one.status == "done"}
    if step is None:
        best = find_best(list(known.values()), *choose_metric(job))
        step = best.step if best else best_step(run.folder, run.checkpoints)
    if step not in known:
        known |= {one.step: one for one in evaluate_steps(job, step, address, screen)}
    with ray_session(address) as ray:
        gpus = gpus_per_worker(job.scale, ray.cluster_resources())
        return [ray.get(harness_task(run, gpus).remote(run, known[step]))]


def worst_rows(job: Job, step: int | None, most: int, address: str | None, screen: Screen) -> tuple[int, list[RowView]]:
    """The costliest rows of a step, by default the best; it is evaluated where its rows are not kept."""
    run = find_run(job)
    if step is None:
        best = find_best(read_evaluations(run.folder, run.shards.eval.key), *choose_metric(job))
        step = best.step if best else best_step(run.folder, run.checkpoints)
    if not run.folder.exists(row_scores_name(step)):
        evaluate_steps(job, step, address, screen)
    return step, costliest_rows(run, step, most)


def evaluate_folder(job: Job, model: Path) -> dict[str, Any]:
    """Evaluate any Hugging Face folder on the job's evaluation data, in this process. Nothing is written.

    Returns:
        Its metrics, intervals and notes, the key of the evaluation shards, the device, and the number of their rows.
    """
    checked = check_job(job)
    run = find_run(checked.job, checked.model, checked.splits)
    task = job_task(job, run.shards.train, str(model))
    held = run.open_held(task)
    numbers = {name: evaluate_model(job, task, str(model), shards)[1] for name, shards in held.items()}
    measured = measure_sets(job, task, numbers)
    where = {"eval_key": run.shards.eval.key, "computed_on": computed_on(pick_device(job.scale.gpus_per_worker))}
    told = {"metrics": measured.metrics, "intervals": measured.intervals, "notes": measured.notes}
    return {**told, **where, "rows": measured.rows}


def shards_of(job: Job, run: Folder) -> Shards:
    """The shards that a run was trained and evaluated on."""
    model = find_model(job)
    shards = load_shards(job, plan_splits(job, model.path)) if model else None
    if shards is None:
        raise JobError(f"the shards of {run} are not there any more, or its data files have changed")
    return shards


def best_step(run: Folder, checkpoints: Folder) -> int:
    """The best committed step, else the newest. Raises JobError where none is committed."""
    committed = committed_steps(checkpoints)
    result = RunResult.model_validate_json(run.read_bytes("result.json")) if run.exists("result.json") else None
    best = (result.best or {}).get("step") if result else None
    if best in committed:
        return int(str(best))
    if not committed:
        raise JobError(f"{run} has no committed checkpoint")
    return committed[-1]
