"""The main job: load, shard, train, select, register. Begin reading at `run_job`.

Each stage leaves a record on storage and is skipped where its record is there, so the same command finishes what a
killed one began and does nothing twice. What the stages share stands in `run_session`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.evaluation.task import export_step, harness_task
from orchestrator.planning.preflight import check_file
from orchestrator.ray_session import ANYWHERE, check_placement
from orchestrator.registry import register as registry
from orchestrator.registry.digests import list_files
from orchestrator.registry.lineage import lineage
from orchestrator.registry.manage import registry_lock
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.model_card import write_card
from orchestrator.registry.promotion import Promotion, RowScores, baselines_of, decide
from orchestrator.registry.read import ModelVersion, champion, is_registered, named_folders, place_of, row_scores_of
from orchestrator.run_session import Asked, RunSession, evaluation_place, finished_run, open_session, stop_asked_for
from orchestrator.sharding.stage import write_shards
from orchestrator.terminal.progress import Screen
from orchestrator.tracking.ray_gauges import RayGauges
from orchestrator.training import controller
from orchestrator.training.kept_agents import KeptAgents
from orchestrator.training.worker_group import WorkerGroup
from trainers.checkpoint.export import PROVENANCE, clear_leftovers
from trainers.errors import Preempted
from trainers.evaluation.harness import is_measured
from trainers.evaluation.selection import find_best, select
from trainers.run.continued import read_line
from trainers.run.describe import describe
from trainers.run.events import Event, GoodputEvent, StepEvent
from trainers.run.folder import Evaluation, RegisteredVersion, RunResult, evaluation_event, step_name
from trainers.run.goodput import account, share
from trainers.run.record import run_of
from trainers.run.row_scores import read_row_scores
from trainers.shards.worth import check_metric
from trainers.storage import Folder
from trainers.training.beginning import begin_run
from trainers.training.divergence import read_skipped


@dataclass(frozen=True)
class TrainOutcome:
    """What the training left behind, beside its checkpoints."""

    evaluations: list[Evaluation]
    """Of every kept checkpoint, by step."""


def run_job(path: Path, overrides: Sequence[str], address: str | None, screen: Screen) -> tuple[Folder, RunResult]:
    """Run a job to its registered model, or go on with it.

    Returns:
        The run folder, and the result that stands in it.

    Raises:
        TuneyardError: with the exit code of what went wrong; the run folder says it too.
    """
    checked = check_file(path, overrides, runs=True)
    if finished := finished_run(checked):
        screen.say(f"already done: {finished[0]}")
        return finished
    with open_session(checked, address, screen) as session:
        shards = write_shards(checked, screen.on_shards)
        check_metric(checked.job, shards, checked.model.path)
        with session.hold(run_of(checked.job, checked.model, shards)):
            outcome = train(session)
            best = select(outcome.evaluations, *session.metric)
            version = register(session, best)
            return session.run.folder, session.finish(outcome.evaluations, best, version)


def train(
    session: RunSession,
    stop: Callable[[], AbstractContextManager[Asked]] = stop_asked_for,
    kept: KeptAgents | None = None,
    anew: bool = False,
) -> TrainOutcome:
    """Train, with evaluations beside it, then evaluate what is left; no training where it has ended for good before.

    Args:
        stop: tells whether the training should stop at the next step; by default on SIGTERM and Ctrl-C.
        kept: the node agents of a process that trains more than once.
        anew: train again where checkpoints are gone, as a sweep does, which cleans the runs that are not the best.
    """
    gpus = check_placement(session.run.job.scale)
    run = session.run.evaluated_on(evaluation_place(session.checked, gpus, ray.cluster_resources()).on)
    ended = controller.finished_training(run.folder, run.checkpoints)
    if not ended and (said := begin_run(run, anew, partial(is_registered, run.job))):
        session.screen.say(said)
    pool, gauges = EvaluationPool(run, gpus), RayGauges(run.folder.name)
    if not ended:

        def show(event: Event) -> None:
            session.screen.on_event(event, session.steps(event))
            gauges.on_event(event)

        session.screen.wait("starting the workers: self-tests and loading")
        with session.timed("train"), stop() as asked, closing(WorkerGroup(run.job, gpus, kept)) as group:
            controller.train(run, pool, group, session.log, show, asked)
            stopped = asked()
        if stopped:  # within the last step, after which nobody asks any more
            raise Preempted("stopped on request after the last step; the same command goes on with the evaluations")
        events = session.events()
        last = max((event.step for event in events if isinstance(event, StepEvent)), default=0)
        spent = account(events)
        session.log.append(GoodputEvent.model_validate({"step": last, "share": share(spent), **spent}))
        pool.prune()
    total = len(pool.waiting()) + len(pool.running)
    with session.timed("evaluate"):
        for done, record in enumerate(pool.finish(), 1):
            session.log.append(evaluation_event(record))
            gauges.on_event(evaluation_event(record))
            said = describe(evaluation_event(record), session.metric[0]) or ""
            session.screen.advance("evaluate", done, total, said.removeprefix("evaluation of "))
            pool.prune()
        evaluations = ask_harness(session, pool.records, gpus)
    return TrainOutcome(evaluations)


def ask_harness(session: RunSession, evaluations: list[Evaluation], gpus: int) -> list[Evaluation]:
    """Put the job's lm-eval tasks, if it names any, to the best checkpoint."""
    job, best = session.run.job, find_best(evaluations, *session.metric)
    if not job.evaluate.lm_eval or best is None or is_measured(job, best.metrics):
        return evaluations
    session.screen.say(f"lm-eval: {', '.join(job.evaluate.lm_eval)} on step {best.step}")
    asked = ray.get(harness_task(session.run, gpus).remote(session.run, best))
    return [asked if one.step == best.step else one for one in evaluations]


def register(session: RunSession, best: Evaluation) -> RegisteredVersion:
    """Weigh the best checkpoint against the champion, register it, and drop the exports that no version names."""
    run, exports, chosen = session.run, session.run.folder / "export", step_name(best.step)
    uri = registry_uri(run.job.storage, run.job.registry.uri)
    with session.timed("register"), registry_lock(uri):
        if not (exports / chosen).exists(PROVENANCE):  # the ranks evaluate without an export
            ray.get(ray.remote(num_cpus=1, scheduling_strategy=ANYWHERE)(export_step).remote(run, best.step))
        clear_leftovers(exports / chosen)
        decision = weigh(session, best)
        parents = lineage(run.job, run.shards, run.model.digest, read_skipped(run.folder), read_line(run.folder))
        write_card(exports / chosen, run.job, best, parents)
        version = registry.register(run.job, run.folder, best, exports / chosen, parents, decision, run.shards)
        named = named_folders(uri)
        for name in exports.list():
            if name != chosen and place_of(str(exports / name)) not in named:
                exports.delete(name)
    session.screen.say(f"registered {version.model} version {version.version}: {version.decision}")
    return version


def weigh(session: RunSession, best: Evaluation) -> Promotion:
    """Whether the best checkpoint should become the champion."""
    run, job = session.run, session.run.job
    candidate = RowScores(f"step {best.step}", best.eval_key, read_row_scores(run.folder, best.step))
    standing = champion(registry_uri(job.storage, job.registry.uri), job.registry.model or job.name)
    lost = standing is not None and _is_replaced(standing, run.folder, best.step)
    before = row_scores_of(standing) if standing and not lost else None
    task, seed, rule = run.load_task(), job.train.seed, job.registry.promote
    baselines = baselines_of(run.folder, candidate, task, seed)
    decision = decide(rule, candidate, before, task, *session.metric, seed, baselines)
    weighed = standing.version if standing else None
    if standing and lost:
        gone = f"version {standing.version}, champion so far, was replaced when its run was trained anew"
        decision = decision.model_copy(update={"reason": f"{decision.reason}; {gone}"})
    return decision if rule != "if_better" else decision.model_copy(update={"champion": weighed})


def _is_replaced(version: ModelVersion, run: Folder, step: int) -> bool:
    """Whether a version is of this run and step, but of an earlier training: its rows are no longer there."""
    of_run = Folder(version.run).name == run.name and version.step == step
    return of_run and version.files != list_files(run / "export" / step_name(step))
