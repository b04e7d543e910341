"""What one rank does from launch to last checkpoint, whoever launched it. Build, build, build, train."""

import time
from typing import Any

from trainers.architecture import plain_model, width
from trainers.batching.batch_plan import BatchPlan
from trainers.batching.batches import StepSource
from trainers.batching.cutting import overhead_positions
from trainers.batching.order import job_order
from trainers.batching.packing import PackIndex, index_packs
from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
from trainers.checkpoint.export import on_meta
from trainers.checkpoint.records import Progress
from trainers.checkpoint.slices import is_offloaded
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.choice import Choice, choose, settle
from trainers.model.compiled import compile_layers
from trainers.model.deepspeed_config import derive_config, keeps_on_disk
from trainers.model.engine import build_engine, release_engine
from trainers.model.fit import check_long_sequences
from trainers.model.memory import ModelSize
from trainers.model.model_size import measure_size
from trainers.model.world import (
    World,
    compute_deterministically,
    device_name,
    free_memory,
    join_world,
    share_cores,
    smallest_device,
)
from trainers.model.zero_settings import sizes_of
from trainers.run.events import DoneEvent, HistoryEvent, RolledBackEvent, StartEvent, VerificationEvent
from trainers.run.record import Run
from trainers.shards.dataset import ShardSet
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tokenizer.encoder import Encoder, load_encoder
from trainers.training.beginning import check_begun
from trainers.training.continuing import begin_from_parent, wait_for_parent
from trainers.training.distill import load_objective, with_teacher
from trainers.training.divergence import Diverged, SkippedSteps, add_skipped, read_skipped, skipped_step, write_skipped
from trainers.training.hooks import Evaluate, Hooks, Objective
from trainers.training.loop import LoopOutcome, LoopSettings, peak_memory, train
from trainers.training.profiling import Profiled
from trainers.training.rank_evaluation import RankEvaluation, elsewhere
from trainers.training.schedule import Schedule
from trainers.verification.isolation import check_isolation
from trainers.verification.longest import check_longest
from trainers.verification.sharing import check_shared
from trainers.verification.tiles import check_tiles
from trainers.verification.verdict import read_verification, require_passed
from trainers.verification.verify import verify_job
from trainers.worker.swap_folder import async_io_problem, check_frozen, swap_files


def run_rank(run: Run, hooks: Hooks) -> LoopOutcome:
    """Train this rank's share of the job, from the newest committed checkpoint if there is one.

    Raises:
        JobError: the job contradicts itself at this world size.
        TrainingError: the checkpoints belong to something else, or the loss diverged too often.
    """
    hooks.at("load", 0)
    if run.job.train.deterministic:
        compute_deterministically()
    job = run.job
    world = join_world(job.scale.cpus_per_worker, job.scale.gpus_per_worker, job.train.sequence_parallel)
    if keeps_on_disk(run.job.train.deepspeed) and (problem := async_io_problem()):
        raise JobError(problem)
    if run.job.train.verify:
        _verify(run, world, hooks)
    while True:
        try:
            return _attempt(run, hooks, world)
        except Diverged as error:
            if world.rank == 0:
                hooks.emit(RolledBackEvent(step=error.step + 1, reason=error.reason))
            hooks.at("load", error.step)
        free_memory()  # the engine that diverged hung in the error's frames


def _verify(run: Run, world: World, hooks: Hooks) -> None:
    """Before the first launch of a model, task and attention backend: is this training what it says? Rank 0 asks.

    Raises:
        TrainingError: where a self-test fails.
    """
    if world.rank == 0:
        found = read_verification(run.job, run.model, device_name(world.device))
        if found is None:
            began = time.monotonic()
            found = verify_job(run.job, run.model)
            failed = [check.name for check in found.checks if not check.passed]
            passed, seconds = len(found.checks) - len(failed), time.monotonic() - began
            hooks.emit(VerificationEvent(passed=passed, failed=tuple(failed), key=found.key, seconds=seconds))
        require_passed(found, run.job.model.dtype)
    world.barrier()


def _attempt(run: Run, hooks: Hooks, world: World) -> LoopOutcome:
    """Settle what the job leaves open, then build everything and train until the end, a stop or a divergence."""
    task = run.load_task()
    check_long_sequences(run.job, run.model.path)
    choice = choose(run.job, world.size, smallest_device(world), lambda: _measure(run))
    job = settle(run.job, choice)
    encoder = load_encoder(run.model.path, job.model.trust_remote_code)
    task.prepare(encoder)

    def largest() -> int:
        config = task.load_config(run.model.path, encoder.pad_id, job.model.trust_remote_code)
        return max(int(p.numel()) for p in on_meta(config, task, job.model.trust_remote_code).parameters())

    with swap_files(derive_config(job, choice.batches), largest, run.folder.name, world) as config:
        return _train(run, job, task, encoder, choice, config, hooks, world)


def _measure(run: Run) -> ModelSize:
    return with_teacher(measure_size(run.job, run.model.path), run.job)


def _train(
    run: Run,
    job: Job,
    task: Task,
    encoder: Encoder,
    choice: Choice,
    config: dict[str, Any],
    hooks: Hooks,
    world: World,
) -> LoopOutcome:
    """Open the shards, build the engine, check what it is given, resume, and train.

    Args:
        job: settled.
        config: of DeepSpeed.
    """
    plan, pad_id = choice.batches, encoder.pad_id
    shards = run.open_shards("train", task)
    packs = index_packs(job, shards)
    order = job_order(job, len(packs))
    objective = load_objective(job, task, pad_id, world)
    skipped = world.broadcast(_begin(run, order.steps, hooks, world))
    engine = build_engine(job, task, run.model.path, pad_id, config, world)
    check_frozen(engine)
    if is_offloaded(engine):
        share_cores(world)
    _check_given(job, engine, objective, task, shards, packs, plan, pad_id, world)
    if job.train.compile:
        compile_layers(engine, task, job.data.max_length)
    source = StepSource(shards, packs, order, plan, world.rank, task, pad_id, _overhead(engine, config, world))
    schedule = Schedule(job.train.schedule, job.train.learning_rate, order.steps, job.train.warmup_ratio)
    checkpointer = _checkpointer(run, job, engine, skipped, hooks, world)
    start = checkpointer.resume()
    host_bytes = checkpointer.prepare()
    if world.rank == 0:
        _tell_start(hooks, start, order.steps, world.size, host_bytes, choice)
    settings = LoopSettings(
        order.steps, job.checkpoint.every_steps, job.train.seed, job.train.spike_factor, skipped.numbers, run.until
    )
    evaluate: Evaluate = elsewhere
    if run.job.evaluate.on == "ranks":
        evaluate = RankEvaluation(run, task, encoder, engine, world, hooks, checkpointer, start.step)
    looked: Hooks = hooks
    if job.train.profile and world.rank == 0:
        looked = Profiled(hooks, run.folder.path / "profile", engine, world, start.step, order.steps)
    try:
        evaluate(start.step)
        outcome = train(engine, objective, source, schedule, settings, start, world, looked, checkpointer, evaluate)
    except Diverged as error:
        hooks.at("commit", error.step)
        _roll_back(run.folder, skipped, error, checkpointer, source, world)
        raise
    finally:
        checkpointer.close()
    _tell_end(hooks, outcome, world)
    hooks.at("done", outcome.progress.step)
    release_engine(engine)  # in a process that goes on its memory is free
    return outcome


def _check_given(
    job: Job,
    engine: Any,
    objective: Objective,
    task: Task,
    shards: ShardSet,
    packs: PackIndex,
    plan: BatchPlan,
    pad_id: int,
    world: World,
) -> None:
    """Try what the first step takes for granted: shared sequences, documents that are kept apart, room for the longest.

    Raises:
        TrainingError: where it does not hold.
    """
    check_tiles(engine, width(plain_model(engine).config), job.model.dtype, world.device)
    if world.group:
        check_shared(engine, task, shards, pad_id, job.model.dtype, world.device, world.group)
    if job.packing:
        check_isolation(
            engine, task, shards, packs, plan.micro_batch_size, pad_id, job.model.attention, world.device, world.group
        )
    check_longest(engine, objective, task, shards, packs, plan.micro_batch_size, pad_id, world)


def _overhead(engine: Any, config: dict[str, Any], world: World) -> float:
    """What a micro-batch costs beside its positions."""
    tensors, _ = sizes_of(engine)
    offload = config["zero_optimization"].get("offload_param") or {}
    kept = offload.get("device", "none") if engine.zero_optimization_stage() == 3 else None
    return overhead_positions(sum(tensors), world.device.type != "cpu", kept)


def _begin(run: Run, steps: int, hooks: Hooks, world: World) -> SkippedSteps:
    """Take over the checkpoint that the job names, if it does, on rank 0, which then knows the steps that are left
    out."""
    if world.rank:
        wait_for_parent(run)
        return SkippedSteps()
    check_begun(run)
    if adopted := begin_from_parent(run, steps, lambda: hooks.at("load", 0)):
        hooks.emit(adopted)
    return read_skipped(run.folder)


def _checkpointer(run: Run, job: Job, engine: Any, skipped: SkippedSteps, hooks: Hooks, world: World) -> Checkpointer:
    return Checkpointer(
        engine,
        run.checkpoints,
        world,
        new_attempt(world),
        run.shards.train.key,
        run.job.identity(),
        hooks.emit,
        skipped.numbers,
        job.checkpoint.start_over,
    )


def _tell_start(hooks: Hooks, start: Progress, steps: int, world_size: int, host_bytes: int, choice: Choice) -> None:
    hooks.emit(HistoryEvent(events=start.history))
    started = StartEvent(
        step=start.step,
        steps=steps,
        world_size=world_size,
        checkpoint_bytes=host_bytes,
        deepspeed=choice.way,
        micro_batch_size=choice.step.micro_batch_size,
        checkpoint_every_layers=choice.step.checkpoint_every,
        feed_forward_tiles=choice.step.tiled,
    )
    hooks.emit(started)


def _tell_end(hooks: Hooks, outcome: LoopOutcome, world: World) -> None:
    """What the run came to, and what each rank needed for it."""
    peaks = world.gather(peak_memory())
    device, host = (tuple(gib for gib in each if gib is not None) for each in zip(*peaks, strict=True))
    step, tokens = outcome.progress.step, outcome.progress.tokens
    if world.rank == 0:
        hooks.emit(DoneEvent(step=step, tokens=tokens, stopped=outcome.stopped, device_gib=device, host_gib=host))


def _roll_back(
    run: Folder, skipped: SkippedSteps, error: Diverged, checkpointer: Checkpointer, source: StepSource, world: World
) -> None:
    """Write down what is left out from now on, on rank 0, wait for the save in flight, and let go of the engine that
    diverged. In this order: the wait may be long, and a rank that ends in it would have forgotten the step."""
    try:
        new = skipped_step(error, source.sequences(error.step), source.origins(error.step))
        listed = add_skipped(skipped, new)
        if world.rank == 0:
            write_skipped(run, listed)
    finally:
        checkpointer.finish()
    world.barrier()
    source.close()
    release_engine(checkpointer.engine)
