"""Host memory for one rank's file, allocated once: the rank copies its state in, the writer process reads it out.

The memory is laid out as the safetensors file it becomes, so that the writer needs neither torch nor a copy. It is a
memfd: shared by handing over a descriptor, not bounded by the size of /dev/shm (64 MiB in a container by default), and
gone with the last process that holds it.
"""

import json
import mmap
import os
from typing import Any

import psutil

from trainers.checkpoint.slices import RankShare
from trainers.checkpoint.tensor_file import plan_file
from trainers.errors import TrainingError


class HostBuffer:
    """One rank's share of the state, as of the last `fill`."""

    def __init__(self, share: RankShare) -> None:
        """Allocate every page now: lack of memory should show before the first step, and no save should wait for it.

        Raises:
            TrainingError: where the machine has not got that much memory left.
        """
        layout = plan_file([piece.spec for piece in share.pieces], {"starts": json.dumps(share.starts)})
        self.num_bytes = layout.num_bytes
        self.descriptor = allocate(layout.num_bytes)
        self._map = mmap.mmap(self.descriptor, layout.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._map[: len(layout.header)] = layout.header
        self._pieces = [(piece.live, self._view(piece.spec, layout.offsets[piece.spec.name])) for piece in share.pieces]
        self._pinned = _pin(self._map)

    def _view(self, spec: Any, offset: int) -> Any:
        import torch

        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        count = spec.num_bytes // getattr(torch, spec.dtype).itemsize
        flat = torch.frombuffer(self._map, dtype=getattr(torch, spec.dtype), count=count, offset=offset)
        return flat.view(spec.shape)

    def fill(self) -> None:
        """Copy the state as it is now; when this returns, the next step may change it."""
        import torch

        for live, view in self._pieces:
            view.copy_(live(), non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unlock the pages; the memory goes with the last that holds it."""
        import torch

        if self._pinned:
            pointer = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pointer))


def allocate(num_bytes: int) -> int:
    """Descriptor of that much shared memory, with every page there."""
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise TrainingError(
            f"checkpoints are copied to host memory first: this rank needs {num_bytes:,} bytes for that, "
            f"{available:,} are available; use more ranks or machines with more memory"
        )
    descriptor = os.memfd_create("tuneyard-checkpoint")
    os.posix_fallocate(descriptor, 0, num_bytes)
    return descriptor


def _pin(mapped: mmap.mmap) -> bool:
    """Page-lock the memory where there is a GPU, which doubles the speed of copies from it."""
    import torch

    if not torch.cuda.is_available():
        return False
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
    return True
