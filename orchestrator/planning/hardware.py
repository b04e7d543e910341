"""Devices that a plan is asked about, and the smallest change of a job that fits them."""

import json
import re
from functools import partial

from trainers.architecture import DOCUMENTS
from trainers.errors import JobError
from trainers.job.load import UNSHARED
from trainers.job.schema import Job
from trainers.model.choice import choose, settle
from trainers.model.memory import ModelSize

GPUS = {
    "v100-16": 16_384, "v100-32": 32_768, "t4-16": 15_360, "a10g-24": 23_028, "l4-24": 23_034, "rtx4090-24": 24_564,
    "rtx5090-32": 32_607, "a100-40": 40_960, "l40s-48": 46_068, "a100-80": 81_920, "h100-80": 81_559,
    "h200-141": 143_771, "b200-180": 183_359,
}  # fmt: skip
"""MiB of memory, as nvidia-smi tells it."""
UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6, "": 2**30}
MOST_WORKERS = 4096
FREED = ("deepspeed", "micro_batch_size", "activation_checkpointing", "feed_forward_tiles")
"""Settings of the section `train` that a job which does not fit may change."""


def device_bytes(gpu: str | None, memory: str | None) -> int | None:
    """Memory of a named GPU, or an amount such as 80GiB; None where neither is asked about.

    Raises:
        JobError: for a name or amount that is not understood.
    """
    if gpu is not None and memory is not None:
        raise JobError("--gpu and --memory: give one of them")
    if gpu is not None and gpu.lower() not in GPUS:
        raise JobError(f"--gpu {gpu}: known are {', '.join(GPUS)}; for another one give --memory, such as 80GiB")
    if gpu is not None:
        return GPUS[gpu.lower()] * 2**20
    if memory is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", memory.strip())
    if match is None or match[2].upper() not in UNITS:
        raise JobError(f"--memory {memory}: give an amount such as 80GiB, 80GB or 80 (GiB)")
    return int(float(match[1]) * UNITS[match[2].upper()])


def cluster_settings(gpu: str | None, memory: str | None, nodes: int | None, gpus_per_node: int) -> list[str]:
    """What the hardware that is asked about sets in the job, as --set takes it: one worker a GPU."""
    if nodes is not None:
        return [f"scale.workers={nodes * gpus_per_node}", "scale.gpus_per_worker=1"]
    return ["scale.gpus_per_worker=1"] if gpu or memory else []


def smallest_fit(job: Job, device: int, size: ModelSize) -> tuple[str, ...]:
    """What must change in a job that does not fit, as --set takes it: settings at first, then sequences that workers
    share, then twice the workers, again and again. Empty where nothing was found."""
    free = dict.fromkeys(FREED, "auto")
    open_job = job.model_copy(update={"train": job.train.model_copy(update=free)})
    workers = job.scale.max_workers
    while workers <= MOST_WORKERS:
        for times in _times_shared(job, size, workers):
            sharing = job.train.sequence_parallel * times
            asked = open_job.model_copy(
                update={"train": open_job.train.model_copy(update={"sequence_parallel": sharing})}
            )
            try:
                choice = choose(asked, workers, device, partial(size.shared, times))
            except JobError:  # the batch does not divide by so many
                continue
            if choice.fits:
                grown = (f"scale.workers={workers}",) if workers != job.scale.max_workers else ()
                shared = (f"train.sequence_parallel={sharing}",) if times > 1 else ()
                return (*grown, *shared, *_changes(job, settle(job, choice)))
        workers *= 2
    return ()


def _times_shared(job: Job, size: ModelSize, workers: int) -> list[int]:
    """How many times as many workers may share a sequence as the job says."""
    times = [1]
    can_share = job.packing and job.model.attention == DOCUMENTS and size.heads
    can_share = can_share and not any(getattr(job.train, name) for name in UNSHARED)
    while can_share and workers % (most := 2 * times[-1] * size.sharing) == 0 and size.heads % most == 0:
        times.append(2 * times[-1])
    return times


def _changes(job: Job, settled: Job) -> list[str]:
    """What a job names otherwise than it was settled; what it leaves to auto may stay so."""
    named = {name: getattr(settled.train, name) for name in FREED if getattr(job.train, name) != "auto"}
    if "activation_checkpointing" in named:
        named["activation_offload"] = settled.train.activation_offload
    return [f"train.{name}={json.dumps(value).strip(chr(34))}" for name, value in named.items()
            if value != getattr(job.train, name)]  # fmt: skip
