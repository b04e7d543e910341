"""The main job: shard, train, evaluate, select, register. Begin reading at `run_stages`.

Each stage leaves a record on storage and is skipped where its record is there, so the same command finishes what a
killed one began and does nothing twice.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.evaluation.selection import select
from orchestrator.planning.plan import plan_job
from orchestrator.planning.preflight import check_job, check_run_storage
from orchestrator.ray_session import check_placement, ray_session
from orchestrator.registry.lineage import lineage
from orchestrator.registry.manage import registry_lock
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.promotion import Promotion, RowScores, chance_baselines, decide
from orchestrator.registry.read import champion, row_scores_of
from orchestrator.registry.register import register
from orchestrator.report.page import write_report
from orchestrator.run_session import OpenRun, finished_result, open_run, summarize
from orchestrator.sharding.stage import write_shards
from orchestrator.terminal.progress import Screen
from orchestrator.training.controller import prune_checkpoints, train
from orchestrator.training.progress import finished_training, record_event
from trainers.errors import Preempted, TuneyardError
from trainers.job.schema import Job
from trainers.run.folder import Evaluation, RegisteredVersion, RunResult, run_folder, step_name
from trainers.run.goodput import account, share
from trainers.run.record import Run, run_of
from trainers.run.row_scores import read_row_scores
from trainers.shards.keys import load_shards
from trainers.storage import Folder
from trainers.tasks import choose_metric
from trainers.training.divergence import read_skipped


@dataclass(frozen=True)
class Stages:
    """What the stages of one run share."""

    run: Run
    opened: OpenRun
    screen: Screen


def run_job(job: Job, address: str | None, screen: Screen) -> tuple[Folder, RunResult]:
    """Run a job to its registered model, or go on with it.

    Returns:
        The run folder, and the result that stands in it.

    Raises:
        TuneyardError: with the exit code of what went wrong; the run folder says it too.
    """
    check_run_storage(job)
    model = check_job(job)
    shards = load_shards(job, model.path)
    if shards is not None:
        folder = run_folder(job, model.digest, shards)
        result = finished_result(folder)
        if result is not None:
            screen.say(f"already done: {folder}")
            return folder, result
    with _stopped_by_sigterm(), ray_session(address), screen.live():
        check_placement(job.scale)  # before hours of sharding, and again after them: nodes come and go
        began = time.monotonic()
        shards = write_shards(job, model.path, screen.on_shards)
        with open_run(run_folder(job, model.digest, shards), job) as opened:
            opened.note_stage("shard", time.monotonic() - began)
            plan = plan_job(job, model)
            opened.folder.write_bytes("plan.json", plan.model_dump_json(indent=1).encode())
            stages = Stages(run_of(job, model, shards), opened, screen)
            with _failures_recorded(stages):
                return opened.folder, run_stages(stages)


def run_stages(stages: Stages) -> RunResult:
    """Everything after the shards: the rest of the line."""
    metric = choose_metric(stages.run.job)
    pool = train_stage(stages)
    evaluations = evaluate_stage(stages, pool)
    best = select(evaluations, *metric)
    version = register_stage(stages, best)
    return finish(stages, evaluations, best, version)


def train_stage(stages: Stages) -> EvaluationPool:
    """Train unless that is done; hands on the evaluations that went on beside it."""
    gpus = check_placement(stages.run.job.scale)
    pool = EvaluationPool(stages.run, gpus)
    checkpoints = stages.run.checkpoints
    if finished_training(stages.run.folder, checkpoints):
        return pool
    metric = choose_metric(stages.run.job)

    def show(event: dict[str, Any]) -> None:
        stages.screen.on_event(event, stages.opened.steps(event))

    with stages.opened.timed("train"), _stop_asked_for() as asked:
        train(stages.run, pool, metric, gpus, stages.opened.log, show, asked)
    note_goodput(stages)
    prune_checkpoints(checkpoints, stages.run.job.checkpoint.keep, pool, metric)
    return pool


def note_goodput(stages: Stages) -> None:
    """Record what the wall time went into so far, for TensorBoard."""
    events = stages.opened.events()
    last = max((event["step"] for event in events if event["kind"] == "step"), default=0)
    spent = account(events)
    stages.opened.log.append({"kind": "goodput", "step": last, "share": share(spent), **spent})


def evaluate_stage(stages: Stages, pool: EvaluationPool) -> list[Evaluation]:
    """Evaluate every kept checkpoint that was not evaluated beside the training."""
    total = len(pool.waiting()) + len(pool.running)
    with stages.opened.timed("evaluate"):
        for done, record in enumerate(pool.finish(), 1):
            stages.opened.log.append(record_event(record))
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(record.metrics.items())[:3])
            stages.screen.advance("evaluate", done, total, f"step {record.step}: {record.error or metrics}")
    return pool.records


def register_stage(stages: Stages, best: Evaluation) -> RegisteredVersion:
    """Weigh the best checkpoint against the champion, register it, and drop the exports of the others."""
    job = stages.run.job
    with stages.opened.timed("register"), registry_lock(registry_uri(job.storage, job.registry.uri)):
        decision = weigh(stages, best)
        parents = lineage(job, stages.run.shards, stages.run.model.digest, read_skipped(stages.run.folder))
        version = register(
            job, stages.run.folder, best, stages.run.folder / "export" / step_name(best.step), parents, decision
        )
        for name in (stages.run.folder / "export").list():
            if name != step_name(best.step):
                (stages.run.folder / "export").delete(name)
    stages.screen.say(f"registered {version.model} version {version.version}: {version.decision}")
    return version


def weigh(stages: Stages, best: Evaluation) -> Promotion:
    """Whether the best checkpoint should become the champion."""
    job = stages.run.job
    metric, mode = choose_metric(job)
    candidate = RowScores(f"step {best.step}", best.eval_key, read_row_scores(stages.run.folder, best.step))
    standing = champion(registry_uri(job.storage, job.registry.uri), job.registry.model or job.name)
    return decide(
        job.registry.promote,
        candidate,
        row_scores_of(standing) if standing else None,
        stages.run.load_task(),
        metric,
        mode,
        job.train.seed,
        chance_baselines(candidate, job.train.seed),
    )


def finish(stages: Stages, evaluations: list[Evaluation], best: Evaluation, version: RegisteredVersion) -> RunResult:
    """Write result.json, then the report."""
    metric, _ = choose_metric(stages.run.job)
    result = summarize(stages.opened, "done", None).model_copy(
        update={
            "best": {"step": best.step, "metric": metric, "value": best.metrics[metric], "metrics": best.metrics},
            "registry": version,
            "evaluations": tuple(evaluations),
        }
    )
    stages.run.folder.write_bytes("result.json", result.model_dump_json(indent=1).encode())
    report(stages, result)
    return result


def report(stages: Stages, result: RunResult) -> None:
    """Write report.html, also of a run that ended badly."""
    parents = lineage(stages.run.job, stages.run.shards, stages.run.model.digest, read_skipped(stages.run.folder))
    write_report(stages.run.folder, result, stages.run.job, stages.opened.events(), stages.run.shards, parents)


@contextmanager
def _failures_recorded(stages: Stages) -> Iterator[None]:
    """Leave a result.json that says how the run ended, also where it ended badly."""
    try:
        yield
    except TuneyardError as error:
        result = summarize(stages.opened, "preempted" if isinstance(error, Preempted) else "failed", str(error))
        stages.run.folder.write_bytes("result.json", result.model_dump_json(indent=1).encode())
        report(stages, result)
        raise


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM outside the training ends the run at once: every other stage is taken up where it was."""

    def stop(*_: Any) -> None:
        raise Preempted("stopped by SIGTERM; the same command goes on from there")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stop_asked_for() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came; a second Ctrl-C ends at once."""
    asked: list[float] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(time.time())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
