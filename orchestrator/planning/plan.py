"""What a job will do, worked out before it takes a worker: batches, steps, memory, disk.

Exact where the shards are written or the data is small; else sequences are estimated from a sample and said to be so.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path

from orchestrator.evaluation.room import why_no_room
from orchestrator.planning.preflight import CheckedJob
from orchestrator.planning.show import first_example, in_short, view
from orchestrator.planning.small_data import count_small
from orchestrator.ray_session import usable_cpus
from trainers.batching.batch_plan import BatchPlan, plan_batches
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.choice import choose
from trainers.model.families import tested_families
from trainers.model.fit import tensor_shapes
from trainers.model.lora import ALL_LINEAR
from trainers.model.memory import GIB, ModelSize, measure_size, needs
from trainers.records import Record
from trainers.run.folder import run_folder
from trainers.run.record import job_task
from trainers.shards.keys import SplitPlan, load_shards
from trainers.shards.manifest import Shards, shards_folder
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.storage import Folder
from trainers.tasks import choose_metric, encode_rows, encode_rules, load_task
from trainers.tasks.chat.render import renderer_of
from trainers.tokenizer.encoder import load_encoder

SAMPLE_ROWS = 500
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and two moments."""


class WayMemory(Record):
    """What one way to keep the state would need."""

    way: str
    device_gib: float
    """Of a worker's device, activations and a margin included."""
    host_gib: float
    """Of a worker's host memory, beside copies for checkpoints."""


class Plan(Record):
    """What a job will do."""

    run: str | None
    """The run folder; null while the shards are not written."""
    exact: bool
    """Whether sequences and steps are counted rather than estimated from a sample."""
    train_rows: int
    train_tokens: int
    sequences: int
    """Sequences an epoch, packed where the job packs."""
    steps: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    labels: tuple[str, ...] | None
    """In the order of the logits, for tasks with labels; null while the shards are not written."""
    metric: str
    mode: str
    parameters: int
    deepspeed: str
    """How the state is kept: a template's name or path."""
    deepspeed_reason: str
    ways: tuple[WayMemory, ...]
    """What each way would need; empty where no device's memory is known."""
    state_gib_per_worker: float
    """Weights, gradients and optimizer state on the device; activations come on top."""
    checkpoint_gib: float
    host_gib_per_worker: float
    """Host memory that a worker's checkpoints are copied to, held from its start to its end."""
    checkpoints: int
    """Checkpoints written over the run; `checkpoint.keep` of them stay."""
    notes: tuple[str, ...]
    example: str | None
    """The first training row as the model gets it, in short; what is trained stands in ⟦ ⟧."""
    job: dict[str, object]
    """The resolved job."""


def plan_job(checked: CheckedJob, device_bytes: int | None = None) -> Plan:
    """Work out a checked job.

    Args:
        device_bytes: memory of a worker's device; by default of this machine's smallest GPU, if workers get any.

    Raises:
        DataError: where its shards are there and refused.
    """
    job, model = checked.job, checked.model
    if device_bytes is None and job.scale.gpus_per_worker != 0:
        device_bytes = gpu_memory()
    choice = choose(job, job.scale.max_workers, device_bytes, lambda: measure_size(job, model.path))
    batches = plan_batches(
        job.train.global_batch_size, choice.micro_batch_size, job.scale.max_workers, job.data.max_length
    )
    shards = load_shards(job, checked.splits)
    counted = count_sequences(job, shards) if shards else count_small(checked)
    rows, tokens, sequences = counted or estimate_sequences(checked)
    steps = job_order(job, max(sequences, 1)).steps
    shapes = tensor_shapes(Path(model.path))
    parameters = sum(prod(shape) for shape in shapes.values())
    saved = count_adapters(shapes, job.model.lora) if job.model.lora else parameters
    size = ModelSize(parameters, saved, 2 if job.model.dtype == "bfloat16" else 4, 0)
    states = {need.way: need.state for need in choice.needs or needs(size, job.scale.max_workers, 1)}
    metric, mode = choose_metric(job)
    first = first_example(view(job, model, checked.splits))
    return Plan(
        run=str(run_folder(job, model.digest, shards)) if shards else None,
        exact=counted is not None,
        train_rows=rows,
        train_tokens=tokens,
        sequences=sequences,
        steps=steps,
        world_size=job.scale.max_workers,
        global_batch_size=batches.global_batch_size,
        micro_batch_size=batches.micro_batch_size,
        accumulation=batches.accumulation,
        labels=job_task(job, shards.train, model.path).labels if shards and load_task(job.task).has_labels else None,
        metric=metric,
        mode=mode,
        parameters=parameters,
        deepspeed=choice.way,
        deepspeed_reason=choice.reason,
        ways=tuple(WayMemory(way=n.way, device_gib=n.device / GIB, host_gib=n.host / GIB) for n in choice.needs),
        state_gib_per_worker=states.get(choice.way, states["zero0"]) / GIB,
        checkpoint_gib=saved * CHECKPOINT_BYTES_PER_PARAMETER / GIB,
        host_gib_per_worker=saved * CHECKPOINT_BYTES_PER_PARAMETER / job.scale.max_workers / GIB,
        checkpoints=-(-steps // job.checkpoint.every_steps),
        notes=(*checked.notes, *architecture_notes(checked), *chat_notes(job, model.path), *notes(job, batches, steps)),
        example=in_short(first) if first else None,
        job=job.model_dump(mode="json"),
    )


def count_sequences(job: Job, shards: Shards) -> tuple[int, int, int]:
    """Rows, tokens and sequences of an epoch, counted; a mixture's repeats are counted each time."""
    from trainers.shards.dataset import ShardSet

    folder = shards_folder(Folder(job.storage), shards.train.key)
    held = ShardSet(folder, shards.train, job_task(job, shards.train))
    packs = index_packs(job, held)
    return len(packs.rows), int(packs.sums(held.lengths).sum()), len(packs)


def estimate_sequences(checked: CheckedJob) -> tuple[int, int, int]:
    """Rows, tokens and sequences of an epoch, from the first rows and the size of the files."""
    job, split = checked.job, checked.splits[0]
    units = plan_units(split.sources)
    sample, sampled_bytes = _sample(job, split, units)
    encoder = load_encoder(checked.model.path, job.model.trust_remote_code)
    pieces = encode_rows(load_task(job.task), sample, encoder, encode_rules(job)).tokens.lengths
    scale = sum(source.size for source in split.sources) / max(sampled_bytes, 1)
    scale *= 1 - (split.fraction or 0.0)
    rows, tokens = round(len(pieces) * scale), round(int(pieces.sum()) * scale)
    return rows, tokens, -(-tokens // job.data.max_length) if job.packing else rows


def _sample(job: Job, split: SplitPlan, units: tuple) -> tuple[list, float]:  # type: ignore[type-arg]
    """First rows of the first unit, and about how many source bytes they stand for."""
    if not units:
        return [], 0
    unit = units[0]
    source = split.sources[unit.file]
    rows = [row for _, row in islice(read_unit(unit, source, task_columns(job)), SAMPLE_ROWS)]
    whole = len(rows) < SAMPLE_ROWS and len(units) == 1
    size = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows if row)
    return [row for row in rows if row], float(source.size if whole else size)


NOT_ADAPTED = re.compile(r"embed|wte|wpe|shared|lm_head")


def count_adapters(shapes: Mapping[str, Sequence[int]], lora: LoraSection) -> int:
    """About how many values a checkpoint with adapters holds: rank x (in + out) for each layer that gets them."""
    every = lora.target_modules == ALL_LINEAR
    adapted = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and (
            not NOT_ADAPTED.search(name) if every else name.removesuffix(".weight").endswith(tuple(lora.target_modules))
        )
    ]
    return sum(lora.rank * sum(shape) for shape in adapted)


def architecture_notes(checked: CheckedJob) -> list[str]:
    """Whether the family is among those that the tests compare with plain transformers, and why a job does not pack."""
    config = json.loads((Path(checked.model.path) / "config.json").read_text(encoding="utf-8"))
    family, known = str(config.get("model_type")), tested_families()
    tasks = known.get(family)
    if tasks is None:
        found = [f"{family} is not among the {len(known)} families of docs/models.md: `tuneyard verify` tests it"]
    elif checked.job.task not in tasks:
        found = [f"{family} is in docs/models.md, but not with task {checked.job.task}: `tuneyard verify` tests it"]
    else:
        found = [f"{family} is in docs/models.md with task {checked.job.task}"]
    if checked.packing is not None and not checked.packing.apart:
        found.append(f"packing is off, for documents of a pack would see each other here: {checked.packing.reason}")
    return found


def chat_notes(job: Job, model_path: str) -> list[str]:
    """Whether a chat template ends the assistant's turns."""
    if job.task != "sft":
        return []
    encoder = load_encoder(model_path, job.model.trust_remote_code)
    if renderer_of(encoder, encoder.fast, encode_rules(job).options.chat_template).ending():
        return []
    return ["the chat template writes nothing behind the assistant's last turn: the model does not learn to stop"]


def notes(job: Job, batches: BatchPlan, steps: int) -> list[str]:
    """What a user would want to know before starting."""
    found = []
    on_cpu = job.scale.gpus_per_worker == 0 or not _has_gpu()
    no_room = why_no_room(job, 0, {"CPU": usable_cpus()})
    if no_room and "RAY_ADDRESS" not in os.environ and on_cpu:  # what a cluster has is known at the start only
        refused = "; evaluate.early_stopping is refused there" if job.evaluate.early_stopping else ""
        found.append(f"on this machine alone, {no_room}{refused}")
    if job.model.dtype == "bfloat16" and not cpu_has_bf16() and on_cpu:
        found.append("this CPU has no bf16 arithmetic: model.dtype float32 is faster here")
    if job.data.max_drop_fraction:
        found.append(f"up to {job.data.max_drop_fraction:.2%} of the rows may be dropped without a refusal")
    if steps < job.checkpoint.every_steps:
        found.append(f"only the last step is saved: {steps} steps are fewer than checkpoint.every_steps")
    if batches.accumulation == 1 and batches.micro_batch_size == 1:
        found.append("one sequence a rank and step: a larger train.global_batch_size would use the hardware better")
    return found


def cpu_has_bf16() -> bool:
    """Whether /proc/cpuinfo lists bf16 instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def gpu_memory() -> int | None:
    """Bytes of memory of this machine's smallest GPU; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in answer.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))
