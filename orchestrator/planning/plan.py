"""What a job will do, worked out before it takes a worker: batches, steps, memory, disk.

Exact where the shards are written or the data is small; else sequences are estimated from a sample and said to be so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.planning.costs import (
    WayMemory,
    count_adapters,
    count_flops,
    measured_speed,
    messages,
    size_model,
    way_memory,
    weight_bytes,
)
from orchestrator.planning.hardware import smallest_fit
from orchestrator.planning.notes import all_notes, metric_notes, where_evaluated
from orchestrator.planning.preflight import CheckedJob
from orchestrator.planning.show import first_example, in_short, view
from orchestrator.planning.small_data import count_small
from orchestrator.ray_session import gpu_memory
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.job.schema import Job
from trainers.model.choice import WAYS, Choice, choose, settle
from trainers.model.deepspeed_config import offloads
from trainers.model.fit import count_parameters, tensor_shapes
from trainers.model.memory import GIB, ModelSize, needs
from trainers.records import Record
from trainers.run.folder import run_folder
from trainers.run.record import job_task
from trainers.shards.keys import SplitPlan, load_shards
from trainers.shards.manifest import Shards, shards_folder
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.storage import Folder
from trainers.tasks import choose_metric, encode_rows, encode_rules, load_task, task_options
from trainers.tasks.labels import check_head, has_head
from trainers.tokenizer.encoder import load_encoder

SAMPLE_ROWS = 500
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and two moments."""


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
    sequence_parallel: int
    """Workers that share each sequence."""
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    lengths_differ: bool
    """Whether shorter sequences than the longest go together in a micro-batch, so that a step may take fewer or, with
    short and long ones, more micro-batches than that."""
    labels: tuple[str, ...] | None
    """In the order of the logits, for tasks with labels; null while the shards are not written."""
    metric: str
    mode: str
    parameters: int
    deepspeed: str
    """How the state is kept: a template's name or path."""
    deepspeed_reason: str
    activation_checkpointing: str | int
    """Of how many layers one is computed again in the backward pass; none, full (every one)."""
    feed_forward_tiles: bool
    """Whether feed-forward layers are computed in tiles, and again in the backward pass."""
    ways: tuple[WayMemory, ...]
    """What each way would need with that step; empty where no device's memory is known."""
    sent_gib_per_step: float | None
    """What each worker sends the others in a step, weights and gradients; null where no device's memory is known."""
    settings: tuple[tuple[str, int, str], ...]
    """DeepSpeed's settings that follow from the model: name, value, reason."""
    device_gib: float | None
    """Memory of a worker's device, where it is known."""
    on_cpu: bool
    """Whether what was asked about are ranks on CPUs, whose memory is the host's."""
    fits: bool | None
    """Whether the job fits it."""
    remedy: tuple[str, ...]
    """Where it does not: the smallest change that does, as --set takes it; empty where none was found."""
    state_gib_per_worker: float
    """Weights, gradients and optimizer state on the device; activations come on top."""
    checkpoint_gib: float
    host_gib_per_worker: float
    """Host memory that a worker's checkpoints are copied to, held from its start to its end."""
    checkpoints: int
    """Checkpoints written over the run; `checkpoint.keep` of them stay."""
    disk_gib: float
    """At the most: checkpoints that stay, the best, the one being written, and the exported model."""
    flops: float
    """Of all steps: six a parameter and token, attention's products, and layers that are computed again."""
    hours: float | None
    """At the throughput that was given, or that the run has shown so far."""
    cost: float | None
    """Of all workers over these hours, at the price that was given."""
    evaluation: str
    """Where checkpoints are evaluated while the training runs, and why."""
    notes: tuple[str, ...]
    example: str | None
    """The first training row as the model gets it, in short; what is trained stands in ⟦ ⟧."""
    job: dict[str, object]
    """The resolved job."""


def plan_job(
    checked: CheckedJob,
    device_bytes: int | None = None,
    tokens_per_s: float | None = None,
    price: float | None = None,
) -> Plan:
    """Work out a checked job.

    Args:
        device_bytes: memory of a worker's device; by default of this machine's smallest GPU, if workers get any.
        tokens_per_s: of one worker; by default what the run has shown so far.
        price: of a worker's hour.

    Raises:
        DataError: where its shards are there and refused.
    """
    job, model = checked.job, checked.model
    elsewhere = device_bytes is not None
    if device_bytes is None and job.scale.gpus_per_worker != 0:
        device_bytes = gpu_memory()
    measure = cache(lambda: size_model(job, model.path))
    choice = choose(job, job.scale.max_workers, device_bytes, measure)
    batches = choice.batches
    shards = load_shards(job, checked.splits)
    run = run_folder(job, model.digest, shards) if shards else None
    if shards is None:
        check_first_labels(checked)
    small = None if shards or model.stand_in else count_small(checked)
    counted = count_sequences(job, shards) if shards else small
    rows, tokens, sequences = counted or estimate_sequences(checked)
    steps = job_order(job, max(sequences, 1)).steps
    trained = tokens * steps * batches.global_batch_size / max(sequences, 1)
    measured = measured_speed(run) if run and not elsewhere else None  # of other devices it says nothing
    speed = tokens_per_s * batches.world_size if tokens_per_s else measured
    metric, mode = choose_metric(job)
    first = None if model.stand_in else first_example(view(job, model, checked.splits))
    costs = _costs(job, model.path, choice, trained, speed, price, measure)
    return Plan(
        run=str(run) if run else None,
        exact=counted is not None,
        train_rows=rows,
        train_tokens=tokens,
        sequences=sequences,
        steps=steps,
        world_size=batches.world_size,
        global_batch_size=batches.global_batch_size,
        micro_batch_size=batches.micro_batch_size,
        accumulation=batches.accumulation,
        lengths_differ=job.lengths_differ,
        labels=job_task(job, shards.train, model.path).labels if shards and load_task(job.task).has_labels else None,
        metric=metric,
        mode=mode,
        checkpoints=-(-steps // job.checkpoint.every_steps),
        **_memory(job, choice, device_bytes, measure),
        **costs,
        evaluation=where_evaluated(job, costs["parameters"], device_bytes, elsewhere),
        notes=(*all_notes(checked, batches, steps, elsewhere), *metric_notes(job, shards, checked.model.path)),
        example=in_short(first) if first else None,
        job=job.model_dump(mode="json"),
    )


def _memory(job: Job, choice: Choice, device_bytes: int | None, measure: Callable[[], ModelSize]) -> dict[str, Any]:
    """The plan's fields on how the step is cut and what it needs."""
    refused = device_bytes is not None and choice.fits is False
    sent = messages(choice, measure()) if choice.needs else {"sent_gib_per_step": None, "settings": ()}
    return {
        **sent,
        "deepspeed": choice.way,
        "sequence_parallel": choice.batches.sharing,
        "deepspeed_reason": choice.reason,
        "activation_checkpointing": settle(job, choice).train.activation_checkpointing,
        "feed_forward_tiles": choice.step.tiled,
        "ways": tuple(
            way_memory(need, device_bytes or 0) for need in choice.needs if need.way in WAYS or need.way == choice.way
        ),
        "device_gib": device_bytes / GIB if device_bytes else None,
        "on_cpu": bool(choice.needs) and not choice.needs[0].on_card,
        "fits": choice.fits,
        "remedy": smallest_fit(job, device_bytes or 0, measure()) if refused else (),
    }


def _costs(
    job: Job,
    model_path: str,
    choice: Choice,
    trained: float,
    speed: float | None,
    price: float | None,
    measure: Callable[[], ModelSize],
) -> dict[str, Any]:
    """The plan's fields on sizes, arithmetic and time.

    Args:
        trained: tokens of all steps.
        speed: of all workers, in tokens a second.
    """
    parameters, saved = _parameters(job, tensor_shapes(Path(model_path)), measure)
    world_size, width = job.scale.max_workers, weight_bytes(job, 1)
    states = choice.needs or needs(ModelSize(parameters, saved, width, 0), world_size, choice.step)
    checkpoint_gib = saved * CHECKPOINT_BYTES_PER_PARAMETER / GIB
    hours = trained / speed / 3600 if speed else None
    return {
        "parameters": parameters,
        "state_gib_per_worker": {need.way: need.state for need in states}.get(choice.way, states[0].state) / GIB,
        "checkpoint_gib": checkpoint_gib,
        "host_gib_per_worker": 0.0 if offloads(choice.way) else checkpoint_gib / world_size,
        "disk_gib": (job.checkpoint.keep + 2) * checkpoint_gib + parameters * width / GIB,
        "flops": trained * count_flops(job, model_path, parameters, saved, choice.step.checkpoint_every),
        "hours": hours,
        "cost": hours * world_size * price if hours and price else None,
    }


def _parameters(job: Job, shapes: Mapping[str, Sequence[int]], measure: Callable[[], ModelSize]) -> tuple[int, int]:
    """Values of the model, and those that a checkpoint holds; from the configuration where there are no weights yet."""
    if not shapes:
        return measure().parameters, measure().trainable
    parameters = count_parameters(shapes)
    return parameters, count_adapters(shapes, job.model.lora) if job.model.lora else parameters


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


def check_first_labels(checked: CheckedJob) -> None:
    """Hold the labels of the first rows against the model's own head. Raises JobError where they cannot fit."""
    job, split, task = checked.job, checked.splits[0], load_task(checked.job.task, task_options(checked.job))
    if not has_head(checked.model.path, task):
        return
    units = plan_units(split.sources)
    rows, _ = _sample(job, split, units)
    encoded = encode_rows(task, rows, load_encoder(checked.model.path, job.model.trust_remote_code), encode_rules(job))
    columns = {name: values.to_pylist() for name, values in encoded.extra.items()}
    shown = [
        label
        for place in range(len(encoded.tokens))
        for label in task.labels_of({name: values[place] for name, values in columns.items()})
    ]
    whole = len(units) == 1 and len(rows) < SAMPLE_ROWS and not split.fraction
    check_head(task, sorted(set(shown)), checked.model.path, whole)


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
