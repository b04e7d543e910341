"""Where a model is put that is asked something: on one device where one holds it, else spread by a device map over all
of this node, its host memory and, at the last, its disk. Begin at `load_to_evaluate` or `load_to_answer`."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainers.host_memory import memory_available
from trainers.job.schema import Job
from trainers.model.engine import load_options
from trainers.model.fit import count_parameters, tensor_shapes
from trainers.model.memory import GIB, MARGIN, RESERVE_BYTES
from trainers.model.world import own_gpus, pick_device
from trainers.pretrained import weight_files
from trainers.tasks import Task

HOST_SHARE = 0.8
"""Of what is free of host memory, at the most: what a forward pass needs comes on top."""


def load_to_evaluate(job: Job, task: Task, path: str, pad_id: int, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode, and the device that its inputs go to.

    Args:
        options: of from_pretrained, beside those of the job.
    """
    import torch

    def load(**where: Any) -> Any:
        return task.load_model(path, pad_id=pad_id, **load_options(job) | options, **where)

    need = count_parameters(tensor_shapes(Path(path))) * getattr(torch, job.model.dtype).itemsize
    return _place(load, need, pick_device(job.scale.gpus_per_worker, job.scale.cpus_per_worker))


def load_to_answer(
    path: str, trust_remote_code: bool, gpus: int | Literal["auto"], threads: int | None = None
) -> tuple[Any, Any]:
    """The same for a causal model that writes text, in the dtype that its files have.

    Args:
        gpus: as scale.gpus_per_worker says; 0 leaves them alone.
        threads: to compute with on the CPU; None leaves them.
    """
    from transformers import AutoModelForCausalLM

    def load(**where: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=trust_remote_code, **where)

    need = sum(file.stat().st_size for file in weight_files(Path(path)))
    return _place(load, need, pick_device(gpus, threads))


def _place(load: Callable[..., Any], need: int, device: Any) -> tuple[Any, Any]:
    """What `load` gives, where it fits.

    Args:
        load: takes the arguments of from_pretrained that say where weights go.
        need: bytes of the weights.
        device: of the inputs.
    """
    memory = device_memory(device)
    if need <= memory.get("cpu" if device.type == "cpu" else device.index, 0):
        return load().to(device).eval(), device
    free = ", ".join(f"{name} has {size / GIB:.1f}" for name, size in memory.items())
    logging.getLogger(__name__).warning(
        "no device holds the model's %.1f GiB (%s): it is spread over them%s, which is slow where it does not fit GPUs",
        need / GIB,
        free,
        "" if need <= sum(memory.values()) else " and the disk",
    )
    folder = tempfile.TemporaryDirectory(prefix="tuneyard-")
    model = load(device_map="auto", max_memory=memory, offload_folder=folder.name).eval()
    model.offloaded_to = folder  # goes with the model
    kind = type(model)  # inputs go where `model.device` says, but a weight that waits on disk is on none
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device)})
    return model, device


def device_memory(device: Any) -> dict[Any, int]:
    """Bytes for weights on each device that this process may use, that of its inputs first; host memory last."""
    import torch

    host = {"cpu": int(memory_available() * HOST_SHARE)}
    if device.type == "cpu":
        return host
    order = sorted(own_gpus(), key=lambda each: each != device.index)
    free = {each: int(torch.cuda.mem_get_info(each)[0] / (1 + MARGIN)) - RESERVE_BYTES for each in order}
    return {each: size for each, size in free.items() if size > 0} | host
