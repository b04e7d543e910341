"""Some families as they train, without Ray: by two ranks of ZeRO-3 and by one, a checkpoint resumed at the other size,
an export that plain transformers reloads. Begin at `train_all`.

Each trial takes a step, saves, takes another; at the other size that other step has the same loss.
"""

import gc
import io
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from orchestrator.training.node_report import free_port
from tests.architectures.matrix import Matrix
from tests.architectures.single import PACKED, job_of, kind_of
from tests.architectures.trials import WAYS, Outcome, Trial
from tests.ranks import run_ranks
from tests.tiny import shard_locally
from trainers.architecture import other_modalities
from trainers.architecture.adjust import read_last_tokens
from trainers.architecture.layer_drop import seed_layer_drop
from trainers.architecture.model import pads_left
from trainers.batching.batch_plan import plan_batches
from trainers.batching.batches import StepSource
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.checkpoint.checkpointer import Checkpointer, state_record
from trainers.checkpoint.export import export_checkpoint
from trainers.checkpoint.records import Progress, Save
from trainers.checkpoint.slices import rank_share
from trainers.checkpoint.writing import commit, write_share
from trainers.errors import JobError
from trainers.model.deepspeed_config import derive_config
from trainers.model.engine import build_engine, release_engine
from trainers.model.fit import tensor_shapes
from trainers.model.source import ModelFolder
from trainers.model.world import World, join_world
from trainers.run.folder import step_name
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.tasks import TaskOptions, load_task
from trainers.tensor_file import write_tensors
from trainers.tokenizer.encoder import load_encoder
from trainers.training.loop import run_micro_batches, seed_step

RATE = 1e-3
T = TypeVar("T")


def train_all(folder: Path, matrix: Matrix, trials: list[Trial]) -> list[Outcome]:
    """All trials, begun and gone on with by two ranks together and by two that are alone.

    Args:
        folder: as `run_matrix` left it, with the models.
        matrix: what it saw.
    """
    models = {(kind_of(trial.family), trial.task): folder / "models" / trial.family for trial in trials}
    shards = {key: shard_locally(_job(*key, folder, model)) for key, model in models.items()}
    place = Place(folder, shards, {family: one.attention for family, one in matrix.packing.items() if one.attention})
    pairs = [trial for trial in trials if trial.ranks == 2]
    begun = run_ranks(_begin_together, 2, place, pairs, patience_s=900)[0]
    alone = [outcome for half in run_ranks(_alone, 2, place, trials, begun, patience_s=900) for outcome in half]
    first = [each for each in alone if each.trial.ranks == 1 and each.trial.resumes]
    resumed = run_ranks(_resume_together, 2, place, first, patience_s=900)[0]
    return [each for each in alone if each not in first] + resumed


def _job(kind: str, task: str, folder: Path, model: Path) -> Any:
    return job_of(task, folder / "jobs" / f"{kind} {task}", model)


@dataclass(frozen=True)
class Place:
    """Where models and data lie."""

    folder: Path
    shards: dict[tuple[str, str], Any]
    attention: dict[str, str]
    """Backends that keep a family's documents apart, where position ids alone do not."""

    def run(self, trial: Trial) -> Run:
        path = self.folder / "models" / trial.family
        job = _job(kind_of(trial.family), trial.task, self.folder, path)
        data = {"packing": trial.packed} if trial.task in PACKED else {}
        attention = (
            {"attention": self.attention[trial.family]} if trial.packed and trial.family in self.attention else {}
        )
        updates = {
            "model": job.model.model_copy(update=WAYS[trial.way] | attention | without_dropout(path, trial.task)),
            "data": job.data.model_copy(update=data),
            "train": job.train.model_copy(update={"deepspeed": "zero3", "global_batch_size": 4, "steps": 2}),
        }
        shards = self.shards[kind_of(trial.family), trial.task]
        return Run(
            job=job.model_copy(update=updates),
            model=ModelFolder(str(path), trial.family),
            shards=shards,
            folder=Folder(str(self.folder / "runs" / trial.name)),
        )


def without_dropout(model: Path, task: str) -> dict[str, float]:
    """Options of a model with which its ranks draw nothing at random, so that it trains alike at any world size."""
    name = "similarity" if task in ("regression", "cosine") else task
    try:
        load_task(name, TaskOptions(dropout=0.0)).load_config(str(model), 0, trust_remote_code=False)
    except JobError:  # it has none
        return {}
    return {"dropout": 0.0}


class Trainee:
    """A trial's engine and data on this rank."""

    def __init__(self, run: Run, world: World) -> None:
        job, self.run, self.world = run.job, run, world
        encoder = load_encoder(run.model.path)
        self.task = run.load_task()
        self.task.prepare(encoder)
        plan = plan_batches(job.train.global_batch_size, 2, world.size, job.data.max_length)
        shards = run.open_shards("train", self.task)
        packs = index_packs(job, shards)
        order = job_order(job, len(packs))
        self.engine = build_engine(job, self.task, run.model.path, encoder.pad_id, derive_config(job, plan), world)
        self.source = StepSource(shards, packs, order, plan, world.rank, self.task, encoder.pad_id)
        rows = [[shards.row(int(packs.pack(at)[0]))] for at in (0, 1)]
        self.single = self.task  # plain transformers knows nothing of packs
        if self.task.options.packing:
            self.single = type(self.task)(self.task.options.model_copy(update={"packing": False}))
            self.single.prepare(encoder)
        self.batch = self.single.collate(rows, encoder.pad_id)

    def step(self, number: int) -> float:
        """One update; the loss over all ranks."""
        seed_step(0, number, self.world.rank)
        seed_layer_drop(self.engine, 0, number)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = RATE
        batch = self.source.next(number)
        loss = run_micro_batches(self.engine, self.task, batch, self.world, lambda: None) / batch.targets
        torch.distributed.all_reduce(loss)
        return float(loss)

    def save(self, step: int) -> None:
        """A committed checkpoint, written by this process."""
        share = rank_share(self.engine)
        live = {piece.spec.name: piece.live for piece in share.pieces}
        stream = io.BytesIO()
        specs = [piece.spec for piece in share.pieces]
        write_tensors(stream, specs, lambda name: live[name]().detach(), {"starts": json.dumps(share.starts)})
        save = Save(id="one", rank=self.world.rank, world_size=self.world.size)
        folder = self.run.checkpoints / step_name(step)
        vote = write_share(folder, save, stream.getbuffer(), 1)
        if self.world.rank == 0:
            key = self.run.shards.train.key
            commit(
                folder,
                vote,
                self.world.size,
                state_record(self.engine, Progress(step, 0), key, self.run.job.identity()),
            )
        self.world.barrier()

    def resume(self) -> int:
        """Go on from what was saved; the step."""
        checkpointer = Checkpointer(
            self.engine, self.run.checkpoints, self.world, "again", self.run.shards.train.key, self.run.job.identity(),
            lambda _: None,
        )  # fmt: skip
        return checkpointer.resume().step

    def close(self) -> None:
        self.source.close()
        release_engine(self.engine)


def exported(trainee: Trainee, step: int) -> tuple[float, tuple[str, ...]]:
    """Export a checkpoint of the state that the engine has and reload it in plain transformers: how far its logits of
    two rows are off, as a share of the largest, and the missing and unexpected keys, those that transformers would not
    publish so, and those of vision and audio that changed."""
    run, task, engine = trainee.run, trainee.single, trainee.engine
    out = run.folder / "export"
    export_checkpoint(run.checkpoints / step_name(step), out, run.job, task, run.model.path)
    auto = getattr(transformers, task.head_class(transformers.AutoConfig.from_pretrained(out.path)))
    model, info = auto.from_pretrained(out.path, output_loading_info=True)
    if any(map(pads_left, model.modules())):  # where its own tokenizer pads, it reads the last token
        read_last_tokens(model)
    inputs, _ = trainee.batch.to("cpu")
    with torch.no_grad():
        engine.eval()
        trained, plain = (task.forward(each, inputs).float() for each in (engine, model.eval()))
        engine.train()
    real = task.real_tokens(inputs).bool()
    if trained.dim() == 3 and trained.shape[:2] == real.shape:  # else one of a row, or of a target's tokens
        trained, plain = trained[real], plain[real]
    keys = tuple(f"{kind} {key}" for kind in ("missing_keys", "unexpected_keys") for key in sorted(info[kind]))
    model.save_pretrained(f"{out.path} again")
    ours, theirs = (tensor_shapes(Path(path)) for path in (out.path, f"{out.path} again"))
    keys += tuple(f"not as published: {name}" for name in sorted(ours.keys() ^ theirs.keys()))
    if others := other_modalities(model):
        before = auto.from_pretrained(run.model.path)
        keys += tuple(
            f"changed: {name}" for name in others if not model.get_parameter(name).equal(before.get_parameter(name))
        )
    return float((trained - plain).abs().max() / trained.abs().max()), keys


def _begin_together(place: Place, trials: list[Trial]) -> dict[Trial, Outcome]:
    """A step, a checkpoint, and a step more."""
    world = _joined()
    return {trial: _begun(trial, place, world) for trial in _each(trials)}


def _joined() -> World:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return join_world(1)


def _each(trials: Iterable[T]) -> Iterator[T]:
    """One after another. DeepSpeed collects garbage for each engine, which shall not look at all that was imported."""
    for number, trial in enumerate(trials):
        if number % 8 == 0:
            gc.collect()
            gc.freeze()
        yield trial


def _begun(trial: Trial, place: Place, world: World) -> Outcome:
    try:
        trainee = Trainee(place.run(trial), world)
        trainee.step(0)
        trainee.save(1)
        error, keys = exported(trainee, 1) if world.size == 1 else (0.0, ())
        loss = trainee.step(1) if trial.resumes else 0.0
        trainee.close()
    except Exception:  # of whatever kind a model's code raises, alike on each rank
        return Outcome(trial, error=traceback.format_exc())
    return Outcome(trial, loss, 0.0, error, keys)


def _alone(place: Place, trials: list[Trial], begun: dict[Trial, Outcome]) -> list[Outcome]:
    """Each rank by itself with half of the trials: go on where two began, and begin the others."""
    half = int(os.environ["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    world = _joined()
    return [
        _resumed(begun[trial], place, world) if trial in begun else _begun(trial, place, world)
        for trial in _each(trials[half::2])
    ]


def _resume_together(place: Place, begun: list[Outcome]) -> list[Outcome]:
    """Two ranks go on where one began."""
    world = _joined()
    return [_resumed(outcome, place, world) for outcome in _each(begun)]


def _resumed(begun: Outcome, place: Place, world: World) -> Outcome:
    """The second step once more, from the checkpoint of the first; one rank exports what comes of it."""
    if begun.error:
        return begun
    try:
        trainee = Trainee(place.run(begun.trial), world)
        assert trainee.resume() == 1
        loss_error = abs(trainee.step(1) - begun.loss) / abs(begun.loss)
        outcome = replace(begun, loss_error=loss_error)
        if world.size == 1:
            trainee.save(2)
            error, keys = exported(trainee, 2)
            outcome = replace(outcome, logits_error=error, keys=keys)
        trainee.close()
    except Exception:
        return replace(begun, error=traceback.format_exc())
    return outcome
