"""`train.deepspeed: auto` and `train.micro_batch_size: auto`: the cheapest way whose memory fits. Pure.

Without devices of their own memory (CPU ranks) auto means zero3 and a micro-batch of at most 4,096 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trainers.batching.batch_plan import BatchPlan, plan_batches
from trainers.job.schema import Job
from trainers.model.memory import GIB, ModelSize, Need, needs

WAYS = ("zero0", "zero1", "zero2", "zero3", "zero3-cpu-offload")
"""The cheapest first: each next one saves memory by more copies and waits."""
OFFLOAD = WAYS[-1]
WITHOUT_DEVICES = "zero3"


@dataclass(frozen=True)
class Choice:
    """How a job's state is kept and its step cut, and why."""

    way: str
    """Name or path of a template."""
    micro_batch_size: int
    reason: str
    needs: tuple[Need, ...] = ()
    """What each way needs at that micro-batch size; empty where no device's memory is known."""


def choose(job: Job, world_size: int, device_bytes: int | None, measure: Callable[[], ModelSize]) -> Choice:
    """Settle what the job leaves to us.

    Args:
        device_bytes: memory of the smallest device; None where ranks compute on CPUs.
        measure: gives the model's sizes; not asked where nothing depends on them.

    Raises:
        JobError: where the batch does not divide.
    """
    named = None if job.train.deepspeed == "auto" else job.train.deepspeed
    batches = plan_batches(job.train.global_batch_size, job.train.micro_batch_size, world_size, job.data.max_length)
    if device_bytes is None or (named is not None and named not in WAYS):
        reason = "named by the job" if named else "ranks compute on CPUs"
        return Choice(named or WITHOUT_DEVICES, batches.micro_batch_size, reason)
    size = measure()
    sizes, per_rank = _micro_batches(job, batches), batches.micro_batch_size * batches.accumulation
    on_device = [each for each in WAYS if each != OFFLOAD]
    # steps too small to fill a GPU cost more than partitioning, and less than state that is fetched from the host
    order = [(least, way) for least in (batches.micro_batch_size, min(sizes)) for way in on_device]
    for least, way in [(min(sizes), named)] if named else [*order, (min(sizes), OFFLOAD)]:
        need = {micro: _need(size, world_size, micro, per_rank // micro, way) for micro in sizes if micro >= least}
        fitting = [micro for micro in need if need[micro].device <= device_bytes]
        if fitting:
            micro = max(fitting)
            figure = f"{need[micro].device / GIB:.1f} of {device_bytes / GIB:.1f} GiB"
            reason = f"named by the job: needs {figure}" if named else f"the cheapest way that fits: {figure}"
            return Choice(way, micro, reason, needs(size, world_size, micro, per_rank // micro))
    way, micro = named or OFFLOAD, min(sizes)
    least_need = _need(size, world_size, micro, per_rank // micro, way).device
    figure = f"{least_need / GIB:.1f} GiB, a device has {device_bytes / GIB:.1f}"
    return Choice(way, micro, f"may not fit: needs {figure}", needs(size, world_size, micro, per_rank // micro))


def _micro_batches(job: Job, batches: BatchPlan) -> list[int]:
    """The sizes that may be taken."""
    if job.train.micro_batch_size != "auto":
        return [batches.micro_batch_size]
    per_rank = batches.micro_batch_size * batches.accumulation
    return [size for size in range(1, per_rank + 1) if per_rank % size == 0]


def _need(size: ModelSize, world_size: int, micro_batch_size: int, accumulation: int, way: str) -> Need:
    return next(need for need in needs(size, world_size, micro_batch_size, accumulation) if need.way == way)


def settle(job: Job, choice: Choice) -> Job:
    """The job with the choice in the place of auto."""
    settled = {"deepspeed": choice.way, "micro_batch_size": choice.micro_batch_size}
    return job.model_copy(update={"train": job.train.model_copy(update=settled)})
