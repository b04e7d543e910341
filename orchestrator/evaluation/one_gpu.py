"""Tasks with one GPU each in processes that last. Begin at `on_own_gpu`.

Ray says which GPU a task has by CUDA_VISIBLE_DEVICES, which CUDA reads once, and so ends a process that had a GPU after
its task. With `ENVIRONMENT` a process sees all GPUs that Ray has on its node, and takes that of each task anew. Between
tasks it holds no more of a GPU than what CUDA itself needs, and it ends when none has come for a while.
"""

import os
import threading
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from trainers.model.world import claim_gpu, free_memory

ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "TUNEYARD_PROCESS": "evaluation"}
"""The second is read by nobody: Ray puts tasks into one process whose environments are alike, and no other shall come
into these."""
IDLE_S = 60.0
"""After so long without a task a process ends: CUDA holds about half a GiB of each GPU that it was on."""
REPLY_S = 1.0
"""So long it takes at the most to send off what a task gave."""
VISIBLE, INSTANCE = "CUDA_VISIBLE_DEVICES", "MIG-"


@dataclass
class _Process:
    """What the tasks of this process leave for the next one."""

    works: bool = True
    """Whether CUDA does: a call that fails on a device fails all after it."""
    instance: str | None = None
    """The part of a card that CUDA shows here, where cards are shared out in parts."""
    leaves: threading.Timer | None = None


_this = _Process()


def on_own_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, inside a Ray task with one GPU, in a process that takes more of them.

    A process that cannot do a task, since CUDA failed in it or shows it another part of a card, ends, and Ray does the
    task again in another; so it does with one that comes in the very moment in which a process leaves.
    """
    if _this.leaves:
        _this.leaves.cancel()
    if not _this.works or not _take_gpu():
        os._exit(1)
    try:
        return function(*arguments)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise
    finally:
        _this.works = _give_back()
        _this.leaves = threading.Timer(IDLE_S if _this.works else REPLY_S, os._exit, (0,))
        _this.leaves.daemon = True
        _this.leaves.start()


def place_of(ids: Collection[str], visible: str | None) -> int | None:
    """Which of the GPUs that a process sees a task has, as torch counts them; None for GPUs that Ray counts and nobody
    sees.

    Args:
        ids: of the task's GPUs, as Ray names them: by number, or as `visible` does.
        visible: CUDA_VISIBLE_DEVICES of the process, None where that is not set.
    """
    names = visible.split(",") if visible is not None else []
    return min((int(one) if visible is None else names.index(one) for one in ids), default=None)


def _take_gpu() -> bool:
    """Compute on the GPU of the present task alone. False where CUDA does not show it to this process."""
    import ray

    ids: list[str] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if ids and ids[0].startswith(INSTANCE):
        os.environ[VISIBLE] = ids[0]  # of several CUDA shows a process the first
        _this.instance = _this.instance or ids[0]
        return ids[0] == _this.instance
    place = place_of(ids, os.environ.get(VISIBLE))
    if place is not None:
        claim_gpu(place)
    return True


def _give_back() -> bool:
    """Give back what nothing refers to. False where CUDA does not work any more."""
    import torch

    try:
        free_memory()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
