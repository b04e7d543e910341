"""Families under ZeRO-3: two steps, a checkpoint, a third step at the other world size, an export, plain transformers.

Each process is a rank that goes through many families; Ray has no part in it. Checkpoints are written and read by the
product's own functions, in this process.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from tests.architectures.families import FAMILIES
from tests.architectures.single import PACKED, Samples, job_of, kind_of, tasks_of
from trainers.architecture import other_modalities
from trainers.batching.batch_plan import plan_batches
from trainers.batching.order import Order
from trainers.checkpoint.export import export_checkpoint
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.records import CheckpointState, Save
from trainers.checkpoint.slices import parameter_shapes, rank_share, restore_state
from trainers.checkpoint.tensor_file import write_tensors
from trainers.checkpoint.writing import commit, write_share
from trainers.errors import JobError
from trainers.job.sections import LoraSection
from trainers.model.deepspeed_config import derive_config
from trainers.model.engine import build_engine
from trainers.model.layer_drop import seed_layer_drop
from trainers.model.world import World, join_world
from trainers.storage import Folder
from trainers.training.loop import seed_step, share_of_step
from trainers.verification import gradients

WAYS = ("full", "lora", "frozen")
SEQUENCES = 4


@dataclass(frozen=True)
class Trial:
    """One way to train one family."""

    family: str
    task: str
    way: str
    packed: bool
    start_size: int
    """World size of the first two steps; the third is taken at the other one."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.task} {self.way}{' packed' if self.packed else ''} from {self.start_size}"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: Trial
    losses: tuple[float, ...] = ()
    problems: tuple[str, ...] = ()
    refused: str = ""


def choose_trials(apart: dict[str, bool]) -> list[Trial]:
    """One trial a family. Tasks, ways, packing and world sizes go round at different paces, so that each meets each."""
    trials = []
    for index, family in enumerate(FAMILIES):
        tasks = tasks_of(family)
        task = tasks[index % len(tasks)]
        packed = task in PACKED and apart.get(family, False) and index % 4 < 3
        trials.append(Trial(family, task, WAYS[(index // 2) % 3], packed, 2 - index % 2))
    return trials


def run_trials(folder: str, *parts: tuple[str, list[Trial]]) -> list[Outcome]:
    """On every rank: "start" some trials, "finish" others."""
    transformers.logging.set_verbosity_error()
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    samples = Samples(Path(folder), f"of {parts[0][0]} {size} {rank}")
    for _, trials in parts:  # before there is a process group, where rank 0 alone would write models, and an engine,
        for trial in trials:  # which would have a part in whatever is loaded beside it
            samples.get(kind_of(trial.family), trial.task, trial.packed)
    world = join_world(1)
    steps = {"start": start, "finish": finish}
    return [_guarded(steps[step], trial, samples, world) for step, trials in parts for trial in trials]


def _guarded(part: Any, trial: Trial, samples: Samples, world: World) -> Outcome:
    """What goes wrong on one rank goes wrong on both here: every exception is raised before a collective or by it."""
    try:
        outcome: Outcome = part(trial, samples, world)
        return outcome
    except JobError as error:
        return Outcome(trial, refused=str(error))
    except Exception as error:
        import traceback

        return Outcome(trial, problems=(f"{type(error).__name__}: {error}", traceback.format_exc()[-1500:]))


def build(trial: Trial, samples: Samples, world: World) -> tuple[Any, Any, Any, Any]:
    """Job, sample, order with plan, engine."""
    sample = samples.get(kind_of(trial.family), trial.task, trial.packed)
    path = samples.folder / "models" / trial.family
    options: dict[str, Any] = {"lora": LoraSection(rank=2)} if trial.way == "lora" else {}
    if trial.way == "frozen":
        config = sample.task.load_config(str(path), sample.pad_id, False)
        with torch.device("meta"):
            empty = getattr(transformers, sample.task.head_class(config)).from_config(config)
        options = {"freeze": (next(name for name, _ in empty.named_parameters()),)}
    place = samples.folder / "jobs" / f"{samples.own} {trial.task} {trial.packed}"
    job = job_of(trial.task, place, path, trial.packed, **options)
    job = job.model_copy(update={"train": job.train.model_copy(update={"deepspeed": "zero3"})})
    plan = plan_batches(SEQUENCES, 2, world.size, 32)
    engine = build_engine(job, sample.task, str(path), sample.pad_id, derive_config(job, plan), world)
    return job, sample, plan, engine


def take_step(engine: Any, sample: Any, plan: Any, step: int, world: World) -> float:
    """One optimizer step as the loop takes it; its mean loss."""
    order = Order(len(sample.packs), SEQUENCES, 3 * SEQUENCES, 0)
    batch = gradients.source_of(sample, order, plan, world.rank).next(step)
    seed_step(0, step, world.rank)
    seed_layer_drop(engine, 0, step)
    total = torch.zeros(1, dtype=torch.float64)
    for micro in batch.micro_batches:
        loss = sample.task.step_loss(engine, *micro.to(world.device))
        engine.backward(share_of_step(loss, batch.targets, world.size), scale_wrt_gas=False)
        engine.step()
        total += loss.detach().double()
    dist.all_reduce(total)
    return float(total) / batch.targets


def start(trial: Trial, samples: Samples, world: World) -> Outcome:
    """Two steps and a checkpoint."""
    job, sample, plan, engine = build(trial, samples, world)
    losses = tuple(take_step(engine, sample, plan, step, world) for step in range(2))
    folder = Folder(str(samples.folder / "checkpoints" / trial.name))
    share = rank_share(engine)
    live = {piece.spec.name: piece.live for piece in share.pieces}
    stream = io.BytesIO()
    specs, starts = [piece.spec for piece in share.pieces], json.dumps(share.starts)
    write_tensors(stream, specs, lambda name: live[name]().detach(), {"starts": starts})
    vote = write_share(folder, Save(id="a", rank=world.rank, world_size=world.size), stream.getbuffer(), 2)
    dist.barrier()
    if world.rank == 0:
        trainable = tuple(name for name, p in engine.module.named_parameters() if p.requires_grad)
        state = CheckpointState(step=2, world_size=world.size, zero_stage=3, shapes=parameter_shapes(engine), tokens=1,
                                trainable=trainable, train_key="k", job=job.identity())  # fmt: skip
        commit(folder, vote, world.size, state)
    dist.barrier()
    engine.destroy()
    return Outcome(trial, losses)


def finish(trial: Trial, samples: Samples, world: World) -> Outcome:
    """Resume at this size, take a step; export the checkpoint and compare it with what was resumed."""
    job, sample, plan, engine = build(trial, samples, world)
    checkpoint = Folder(str(samples.folder / "checkpoints" / trial.name))
    reader = CheckpointReader(LocalCopies(checkpoint))
    restore_state(engine, reader.read, 2)
    engine.eval()
    batch = gradients.collate(sample, gradients.rows_of(sample, range(2)))
    inputs, _ = batch.to("cpu")
    with torch.no_grad():
        resumed = sample.task.forward(engine, inputs)
    engine.train()
    loss = take_step(engine, sample, plan, 2, world)
    engine.destroy()
    problems: list[str] = []
    if world.rank == 0:
        problems = exported_problems(trial, samples, job, sample, checkpoint, inputs, resumed)
    dist.barrier()
    return Outcome(trial, (loss,), tuple(problems))


def exported_problems(
    trial: Trial, samples: Samples, job: Any, sample: Any, checkpoint: Folder, inputs: Any, resumed: Any
) -> list[str]:
    """What is wrong with the export: keys, logits, weights that text does not pass through."""
    out = samples.folder / "exports" / trial.name
    export_checkpoint(checkpoint, Folder(str(out)), job, sample.task, job.model.path)
    config = transformers.AutoConfig.from_pretrained(out)
    auto = getattr(transformers, sample.task.head_class(config))
    model, info = auto.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    problems = [f"{kind} {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    with torch.no_grad():
        logits = sample.task.forward(model.eval(), inputs)
    moved = float((logits - resumed).abs().max()) / max(float(resumed.abs().max()), 1e-30)
    if not moved <= 1e-5:
        problems.append(f"logits of the export are {moved:.1e} off")
    unused = set(other_modalities(model))
    if unused:
        before = auto.from_pretrained(job.model.path, dtype=torch.float32).state_dict()
        after = dict(model.named_parameters())
        problems += [f"{name} changed" for name in unused if not after[name].equal(before[name])]
    return problems
