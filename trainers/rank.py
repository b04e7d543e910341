"""What one rank does from launch to last checkpoint, whoever launched it. Build, build, build, train."""

import time
from dataclasses import dataclass, replace
from typing import Any

from trainers.batch_plan import plan_batches
from trainers.batches import StepSource
from trainers.checkpoint.checkpointer import Checkpointer, barrier, new_attempt
from trainers.data.dataset import ShardSet
from trainers.data.index import load_packs
from trainers.data.manifest import ShardManifest
from trainers.data.mixture import draw_mixture, entries_of_rows, shares_of
from trainers.data.order import Order, plan_order
from trainers.data.packing import PackIndex, one_row_each, pack_rows
from trainers.data.tokenizer import load_encoder
from trainers.deepspeed_config import derive_config
from trainers.distill import load_objective
from trainers.divergence import Diverged, SkippedSteps, add_skipped, read_skipped, skipped_step, write_skipped
from trainers.engine import build_engine
from trainers.isolation import check_isolation
from trainers.job import Job
from trainers.loop import Hooks, LoopOutcome, LoopSettings, train
from trainers.model_source import ModelFolder
from trainers.runs import checkpoints_folder
from trainers.schedule import Schedule
from trainers.storage import Folder
from trainers.tasks import Task, load_task, task_options
from trainers.verification.verify import demand, read_verification, verify_job
from trainers.world import World, join_world


@dataclass(frozen=True)
class TrainRequest:
    """All a rank needs to know; small enough to travel."""

    job: Job
    model: ModelFolder
    train_shards: ShardManifest
    shards_folder: Folder
    run: Folder


def run_rank(request: TrainRequest, hooks: Hooks) -> LoopOutcome:
    """Train this rank's share of the job, from the newest committed checkpoint if there is one.

    Raises:
        JobError: the job contradicts itself at this world size.
        TrainingError: the checkpoints belong to something else, or the loss diverged too often.
    """
    hooks.at("load", 0)
    world = join_world(request.job.scale.cpus_per_worker)
    if request.job.train.verify:
        _verify(request, world, hooks)
    while True:
        try:
            return _attempt(request, hooks, world)
        except Diverged as error:
            if world.rank == 0:
                hooks.emit({"kind": "rolled_back", "step": error.step + 1, "reason": error.reason})
            hooks.at("load", error.step)


def _verify(request: TrainRequest, world: World, hooks: Hooks) -> None:
    """Before the first launch of a model, task and attention backend: is this training what it says? Rank 0 asks.

    Raises:
        TrainingError: where a self-test fails.
    """
    if world.rank == 0:
        found = read_verification(request.job, request.model)
        if found is None:
            began = time.monotonic()
            found = verify_job(request.job, request.model)
            failed = [check.name for check in found.checks if not check.passed]
            told = {"passed": len(found.checks) - len(failed), "failed": failed, "key": found.key}
            hooks.emit({"kind": "verification", **told, "seconds": time.monotonic() - began})
        demand(found, request.job.model.dtype)
    barrier(world)


def _attempt(request: TrainRequest, hooks: Hooks, world: World) -> LoopOutcome:
    """Build everything, resume, and train until the end, a stop or a divergence."""
    job = request.job
    task = job_task(job, request.train_shards)
    plan = plan_batches(job.train.global_batch_size, job.train.micro_batch_size, world.size, job.data.max_length)
    encoder = load_encoder(request.model.path, job.model.trust_remote_code)
    task.prepare(encoder)
    pad_id = encoder.pad_id
    shards = ShardSet(request.shards_folder, request.train_shards, task)
    packs = index_packs(job, shards)
    order = job_order(job, len(packs))
    objective = load_objective(job, task, pad_id, world)
    skipped = read_skipped(request.run)
    engine = build_engine(job, task, request.model.path, pad_id, derive_config(job, plan), world)
    if job.packing:
        check_isolation(engine, task, shards, pad_id, job.model.attention, world.device)
    source = StepSource(shards, packs, order, plan, world.rank, task, pad_id)
    schedule = Schedule(job.train.schedule, job.train.learning_rate, order.steps, job.train.warmup_ratio)
    checkpointer = Checkpointer(
        engine,
        checkpoints_folder(job, request.run),
        world,
        new_attempt(world),
        request.train_shards.key,
        job.identity(),
        hooks.emit,
        skipped.numbers,
    )
    start = checkpointer.resume()
    host_bytes = checkpointer.prepare()
    if world.rank == 0:
        hooks.emit({"kind": "history", "events": list(start.history)})
        found = {"step": start.step, "steps": order.steps, "world_size": world.size, "checkpoint_bytes": host_bytes}
        hooks.emit({"kind": "start", **found})
    settings = LoopSettings(
        order.steps, job.checkpoint.every_steps, job.train.seed, job.train.spike_factor, skipped.numbers
    )
    try:
        outcome = train(engine, objective, source, schedule, settings, start, world, hooks, checkpointer)
    except Diverged as error:
        checkpointer.finish()
        listed = add_skipped(skipped, skipped_step(error, source.sequences(error.step), source.origins(error.step)))
        _roll_back(request.run, listed, engine, source, world)
        raise
    finally:
        checkpointer.close()
    if world.rank == 0:
        done = {"step": outcome.progress.step, "tokens": outcome.progress.tokens, "stopped": outcome.stopped}
        hooks.emit({"kind": "done", **done})
    hooks.at("done", outcome.progress.step)
    return outcome


def _roll_back(run: Folder, listed: SkippedSteps, engine: Any, source: StepSource, world: World) -> None:
    """Write down what is left out from now on, on rank 0, and let go of the engine that diverged."""
    if world.rank == 0:
        write_skipped(run, listed)
    barrier(world)
    source.close()
    engine.destroy()


def job_task(job: Job, shards: ShardManifest) -> Task:
    """The job's task, knowing the labels of the training data."""
    task = load_task(job.task, replace(task_options(job), label_counts=shards.labels))
    task.labels = tuple(shards.labels)
    return task


def index_packs(job: Job, shards: ShardSet) -> PackIndex:
    """Which rows share a sequence: the index beside the shards, or the same made anew; every rank gets the same."""
    capacity, seed = job.data.max_length, job.train.seed
    if shards.manifest.entries:
        rows = draw_mixture(entries_of_rows(shards.manifest), shards.lengths, shares_of(job), seed)
        packs = pack_rows(shards.lengths[rows], capacity, seed) if job.packing else one_row_each(len(rows))
        return PackIndex(packs.offsets, rows[packs.rows])
    return load_packs(shards.folder, shards.lengths, capacity, seed) if job.packing else one_row_each(len(shards))


def job_order(job: Job, sequences: int) -> Order:
    """The order in which a job sees its sequences."""
    return plan_order(sequences, job.train.global_batch_size, job.train.epochs, job.train.steps, job.train.seed)
