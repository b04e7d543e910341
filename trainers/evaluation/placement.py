"""Where a model is put to be evaluated: on one device where one holds it, else spread by a device map over all of this
node, its host memory and, at the last, its disk. Begin at `load_to_evaluate`."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from trainers.host_memory import memory_available
from trainers.job.schema import Job
from trainers.model.engine import load_options
from trainers.model.fit import count_parameters, tensor_shapes
from trainers.model.memory import GIB, MARGIN, RESERVE_BYTES
from trainers.model.world import pick_device
from trainers.tasks import Task

HOST_SHARE = 0.8
"""Of what is free of host memory, at the most: what a forward pass needs comes on top."""


def load_to_evaluate(job: Job, task: Task, path: str, pad_id: int) -> tuple[Any, Any]:
    """A model in evaluation mode, and the device that its inputs go to."""
    import torch

    device = pick_device(job.scale.gpus_per_worker, job.scale.cpus_per_worker)
    need = count_parameters(tensor_shapes(Path(path))) * getattr(torch, job.model.dtype).itemsize
    memory = device_memory(device)
    if need <= next(iter(memory.values())):
        return task.load_model(path, pad_id=pad_id, **load_options(job)).to(device).eval(), device
    free = ", ".join(f"{name} has {size / GIB:.1f}" for name, size in memory.items())
    logging.getLogger(__name__).warning(
        "no device holds the model's %.1f GiB (%s): it is spread over them%s, which is slow where it does not fit GPUs",
        need / GIB,
        free,
        "" if need <= sum(memory.values()) else " and the disk",
    )
    folder = tempfile.TemporaryDirectory(prefix="tuneyard-")
    model: Any = task.load_model(
        path, pad_id=pad_id, **load_options(job), device_map="auto", max_memory=memory, offload_folder=folder.name
    ).eval()
    model.inputs_device = device  # a weight that waits on disk is on none
    model.offloaded_to = folder  # goes with the model
    return model, device


def device_memory(device: Any) -> dict[Any, int]:
    """Bytes for weights on each device that this process may use, that of its inputs first; host memory last."""
    import torch

    host = {"cpu": int(memory_available() * HOST_SHARE)}
    if device.type == "cpu":
        return host
    order = sorted(range(torch.cuda.device_count()), key=lambda each: each != device.index)
    free = {each: int(torch.cuda.mem_get_info(each)[0] / (1 + MARGIN)) - RESERVE_BYTES for each in order}
    return {each: size for each, size in free.items() if size > 0} | host
