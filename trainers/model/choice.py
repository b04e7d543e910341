"""What the job leaves to us of how a step is cut: how the state is kept, the micro-batch, which layers are computed
again. The cheapest whose memory fits. Pure.

Without devices of their own memory (CPU ranks) auto means zero3, a micro-batch of at most 4,096 tokens, and activations
that are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import inf

from trainers.batching.batch_plan import BatchPlan
from trainers.job.schema import Job
from trainers.model.deepspeed_config import job_batches, way_of
from trainers.model.memory import GIB, ModelSize, Need, StepShape, needs

WAYS = {"zero0": 1.0, "zero1": 1.1, "zero2": 1.2, "zero3": 1.9, "zero3-cpu-offload": 10.0}
"""Ways to keep the state, and about how much longer a step takes than with all of it on the device. Measured on a Llama
of 1.24 billion parameters on one H200: 0.65 s by torch alone, 0.78 with stage 2, 1.27 with stage 3."""
NAMED = ("zero3-nvme-offload",)
"""Ways that are taken where a job names them: a disk is written many times over."""
AGAIN = {(0, False, False): 1.0, (2, False, False): 1.17, (1, False, False): 1.33, (1, True, False): 1.5,
         (1, True, True): 1.75}  # fmt: skip
"""Of how many layers one is computed again, whether what it keeps goes to the host, whether its feed-forward part comes
in tiles, and the time: a forward pass is a third of a step, feed-forward layers are two thirds of it."""
SMALL = 2.0
"""What micro-batches below 4,096 tokens cost: too small to fill a GPU."""
WITHOUT_DEVICES = {False: "zero3", True: "zero2"}
"""Where no device's memory is known, by whether layers are compiled."""


@dataclass(frozen=True)
class Choice:
    """How a job's state is kept and its step cut, and why."""

    way: str
    """Name or path of a template."""
    batches: BatchPlan
    step: StepShape
    reason: str
    fits: bool | None = None
    """None where no device's memory is known."""
    needs: tuple[Need, ...] = ()
    """What each way needs with that step; empty where no device's memory is known."""


def choose(job: Job, world_size: int, device_bytes: int | None, measure: Callable[[], ModelSize]) -> Choice:
    """Settle what the job leaves to us.

    Args:
        device_bytes: memory of the smallest device, or of what a rank on a CPU may take; None where that is not known.
        measure: gives the model's sizes; not asked where nothing depends on them.

    Raises:
        JobError: where the batch does not divide.
    """
    named = None if job.train.deepspeed == "auto" else job.train.deepspeed
    batches = job_batches(job, world_size, named or WITHOUT_DEVICES[job.train.compile])
    on_cpu = job.scale.gpus_per_worker == 0
    own = named is not None and named not in (*WAYS, *NAMED)
    if device_bytes is None or (own and not (on_cpu and way_of(job.train.deepspeed))):
        reason = "named by the job" if named else "ranks compute on CPUs"
        return Choice(named or WITHOUT_DEVICES[job.train.compile], batches, _shape(job, batches), reason)
    size = measure()
    if on_cpu:
        return _on_cpu(job, batches, world_size, device_bytes, size)
    least, chosen = inf, None
    for _, way, cut, step in _candidates(job, batches, size):
        need = _need(size, world_size, step, way)
        if need.device <= device_bytes:
            figure = f"{need.device / GIB:.1f} of {device_bytes / GIB:.1f} GiB"
            reason = f"named by the job: needs {figure}" if named else f"the cheapest way that fits: {figure}"
            return Choice(way, cut, step, reason, True, needs(size, world_size, step))
        if need.device < least:
            least, chosen = need.device, (way, cut, step)
    assert chosen is not None
    figure = f"{least / GIB:.1f} GiB, a device has {device_bytes / GIB:.1f}"
    return Choice(*chosen, f"may not fit: needs {figure}", False, needs(size, world_size, chosen[2]))


def _on_cpu(job: Job, batches: BatchPlan, world_size: int, memory: int, size: ModelSize) -> Choice:
    """What ranks on CPUs do anyway, held against the memory that each may take."""
    way = WITHOUT_DEVICES[job.train.compile] if job.train.deepspeed == "auto" else job.train.deepspeed
    step = _shape(job, batches)
    found = needs(size, world_size, step, on_card=False)
    if way not in (*WAYS, *NAMED):  # a file of the job's own
        found = tuple(replace(each, way=way) for each in found if each.way == way_of(way))
    need = next(each.device for each in found if each.way == way)
    figures = f"ranks compute on CPUs; one needs {need / GIB:.1f} GiB and may take {memory / GIB:.1f}"
    return Choice(way, batches, step, figures, need <= memory, found)


def _shape(job: Job, batches: BatchPlan) -> StepShape:
    again = job.train.checkpoint_every_layers, job.train.activation_offload, job.train.feed_forward_tiles is True
    return StepShape(batches.micro_batch_size, batches.accumulation, *again)


def _candidates(job: Job, batches: BatchPlan, size: ModelSize) -> list[tuple[float, str, BatchPlan, StepShape]]:
    """Every way and step that the job allows, with its cost; the cheapest first, of equal cost the largest step."""
    ways = WAYS if job.train.deepspeed == "auto" else {job.train.deepspeed: 1.0}
    if job.train.compile:
        ways = {way: cost for way, cost in ways.items() if not way.startswith("zero3")}
    found = []
    for (way, slower), (again, longer) in product(ways.items(), _layers_again(job, size).items()):
        for cut in _cuts(job, batches, way):
            cost = slower * longer * (SMALL if cut.micro_batch_size < batches.micro_batch_size else 1.0)
            step = StepShape(cut.micro_batch_size, cut.accumulation, *again)
            found.append((cost, way, _spread(job, cut, size, way, step), step))
    return sorted(found, key=lambda each: (each[0], -each[3].micro_batch_size))


def _layers_again(job: Job, size: ModelSize) -> dict[tuple[int, bool, bool], float]:
    """The settings of activation checkpointing that may be taken, with feed-forward layers in tiles or not."""
    asked, tiles = job.train, job.train.feed_forward_tiles
    if asked.activation_checkpointing != "auto":
        again = asked.checkpoint_every_layers, asked.activation_offload
        found = {(*again, False): 1.0, (*again, True): 1.17}
    elif not size.checkpoints:
        found = {(0, False, False): 1.0, (0, False, True): 1.17}
    else:
        found = {setting: cost for setting, cost in AGAIN.items() if setting[1] or not asked.activation_offload}
    if tiles is True:
        return {(*setting[:2], True): cost for setting, cost in found.items()}
    can_tile = tiles == "auto" and size.tiled_layer_bytes and not asked.compile
    return {setting: cost for setting, cost in found.items() if can_tile or not setting[2]}


def _cuts(job: Job, batches: BatchPlan, way: str) -> Iterator[BatchPlan]:
    """The cuts that may be taken."""
    per_rank = batches.per_rank
    for micro in range(1, per_rank + 1) if job.train.micro_batch_size == "auto" else [batches.micro_batch_size]:
        if per_rank % micro == 0:
            yield job_batches(job, batches.world_size, way, micro)


def _spread(job: Job, cut: BatchPlan, size: ModelSize, way: str, step: StepShape) -> BatchPlan:
    """The cut, with more micro-batches than it must have where the memory of one is enough for that: each holds at most
    half as many of the longest sequences, beside the sum of their gradients. DeepSpeed would keep a sum of bf16
    gradients in fp32 also where one micro-batch comes."""
    wider = replace(cut, spread=True)
    if not job.lengths_differ or (size.weight_bytes < 4 and way != "zero0") or wider.rounds == cut.rounds:
        return cut
    several = replace(step, accumulation=2)
    if cut.accumulation == 1:
        several = replace(several, micro_batch_size=-(-step.micro_batch_size // 2))
    enough = _need(size, cut.world_size, step, way).device
    return wider if _need(size, cut.world_size, several, way).device <= enough else cut


def _need(size: ModelSize, world_size: int, step: StepShape, way: str) -> Need:
    return next(need for need in needs(size, world_size, step) if need.way == way)


def settle(job: Job, choice: Choice) -> Job:
    """The job with the choice in the place of auto."""
    step = choice.step
    settled = {
        "deepspeed": choice.way,
        "micro_batch_size": step.micro_batch_size,
        "activation_checkpointing": {0: "none", 1: "full"}.get(step.checkpoint_every, step.checkpoint_every),
        "activation_offload": step.offload,
        "feed_forward_tiles": step.tiled,
    }
    return job.model_copy(update={"train": job.train.model_copy(update=settled)})
