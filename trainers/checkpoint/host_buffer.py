"""Host memory for one rank's file, allocated once: the rank copies its state in, the writer process reads it out.

The memory is laid out as the safetensors file it becomes, so that the writer needs neither torch nor a copy. It is a
memfd: shared by handing over a descriptor, not bounded by the size of /dev/shm (64 MiB in a container by default), and
gone with the last process that holds it. State that is offloaded, to host memory or to disk, is not copied:
`OffloadedFile`.
"""

import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from trainers.checkpoint.records import SaveRequest, Vote
from trainers.checkpoint.slices import RankShare
from trainers.checkpoint.writing import CHUNK_BYTES, find_refusal, write_rank_file
from trainers.errors import TrainingError
from trainers.host_memory import memory_available, memory_limit, node_id
from trainers.model.world import World
from trainers.storage import Folder
from trainers.tensor_file import FileLayout, file_chunks, plan_file

FREED_WITHIN_S = 60.0
"""How long memory may take to come back; page-locked memory of a rank that was killed takes seconds."""


def make_buffer(share: RankShare, world: World) -> "HostBuffer":
    """A rank's buffer, once the memory of every node holds those of all its ranks.

    Raises:
        TrainingError: where a node can never hold them.
        MemoryError: where it cannot now, also after a wait: a restart may find more.
    """
    sizes = world.gather((node_id(), _layout(share).num_bytes))
    here = [size for node, size in sizes if node == node_id()]
    problem = world.gather(find_shortage(sum(here), len(here)))
    for error in filter(None, problem):
        raise error
    return HostBuffer(share)


def _layout(share: RankShare) -> FileLayout:
    return plan_file([piece.spec for piece in share.pieces], _metadata(share))


def _metadata(share: RankShare) -> dict[str, str]:
    return {"starts": json.dumps(share.starts)}


class HostBuffer:
    """One rank's share of the state, as of the last copy."""

    def __init__(self, share: RankShare) -> None:
        """Allocate every page now, since lack of memory should show before the first step. A thread maps and
        page-locks them beside the first steps (about a second a GB); the first copy waits for it.
        """
        layout = _layout(share)
        self.num_bytes = self.file_bytes = layout.num_bytes
        self.descriptor = allocate(layout.num_bytes)
        self._map = mmap.mmap(self.descriptor, layout.num_bytes)
        self._map[: len(layout.header)] = layout.header
        self._pieces = [(piece, self._view(piece.spec, layout.offsets[piece.spec.name])) for piece in share.pieces]
        self._is_locked = current_gpu() is not None
        self._stream = copy_stream()
        self._locked = Beside(partial(lock_pages, self._map, self._is_locked))

    def _view(self, spec: Any, offset: int) -> Any:
        import torch

        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        count = spec.num_bytes // getattr(torch, spec.dtype).itemsize
        flat = torch.frombuffer(self._map, dtype=getattr(torch, spec.dtype), count=count, offset=offset)
        return flat.view(spec.shape)

    def copy_beside(self, then: Callable[[float], None]) -> "Beside":
        """Begin to copy the state as it is now. It must not change before `Beside.wait` returns.

        Args:
            then: called with the seconds that the copy took, in the thread that copies.
        """
        import torch

        self._locked.wait()
        with torch.no_grad():
            later = []
            for piece, view in self._pieces:
                if piece.is_fixed:
                    later.append((piece.live().detach(), view))
                else:
                    view.copy_(piece.live())
        return Beside(Copying(later, self._stream, then))

    def close(self) -> None:
        """Unlock the pages; the memory goes with the last that holds it."""
        import torch

        self._locked.wait()
        if self._is_locked:
            pointer = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pointer))


class Beside:
    """Work in a thread, on the GPU of this one, beside the forward and backward passes of the next step.

    Between two updates the optimizer's state is only read, so what reads it needs to end before the next update alone
    (Mohan et al. 2021, CheckFreq, FAST '21).
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._gpu = work, current_gpu()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="copy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._gpu is not None:  # a thread starts on GPU 0, and would make a context of 0.5 GB there
                import torch

                torch.cuda.set_device(self._gpu)
            self._work()
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        """Whether the work is done, without waiting."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end of the work, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Copying:
    """Work that copies tensors, in a stream beside that of the steps where there is one."""

    def __init__(self, pairs: list[tuple[Any, Any]], stream: Any, then: Callable[[float], None]) -> None:
        import torch

        self._pairs, self._stream, self._then = pairs, stream, then
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # the update that made this state

    def __call__(self) -> None:
        import torch

        began = time.monotonic()
        with torch.no_grad(), torch.cuda.stream(self._stream):  # None: no stream of a GPU
            for live, view in self._pairs:
                view.copy_(live, non_blocking=self._stream is not None)
        if self._stream is not None:
            self._stream.synchronize()
        self._then(time.monotonic() - began)


class OffloadedFile:
    """One rank's file, written by the rank from where its state lies: in host memory or in swap files.

    A second copy would need 12 bytes a parameter of the memory that offloading makes scarce. So the next update waits
    until the file is on storage, in place of until it is copied.
    """

    num_bytes = CHUNK_BYTES
    """Of host memory: what lies on disk or in another type is read in parts of this size."""

    def __init__(self, share: RankShare) -> None:
        self._share = share
        self.file_bytes = _layout(share).num_bytes
        self.descriptor = allocate(mmap.PAGESIZE)  # the writer process commits, and reads nothing

    def write_beside(self, request: SaveRequest, then: Callable[[float, Vote], None]) -> Beside:
        """Begin to write the state as it is now. It must not change before `Beside.wait` returns.

        Args:
            then: called with the seconds that it took and this rank's vote, in the thread that writes.
        """
        moving = {piece.spec.name: piece.live().clone() for piece in self._share.pieces if not piece.is_fixed}
        return Beside(partial(self._write, request, moving, then))

    def _write(self, request: SaveRequest, moving: Mapping[str, Any], then: Callable[[float, Vote], None]) -> None:
        began, folder = time.monotonic(), Folder(request.folder)
        pieces = {piece.spec.name: piece for piece in self._share.pieces}

        def parts(name: str) -> Iterable[Any]:
            return [moving[name]] if name in moving else pieces[name].parts(CHUNK_BYTES // 4)

        specs = [piece.spec for piece in self._share.pieces]
        chunks = file_chunks(specs, parts, _metadata(self._share))
        if error := find_refusal(folder):
            vote = Vote(save=request.save.id, error=error)
        else:
            vote = write_rank_file(folder, request.save, chunks, request.total_bytes)
        then(time.monotonic() - began, vote)

    def close(self) -> None:
        """There is nothing to unlock."""


def find_shortage(num_bytes: int, ranks: int) -> Exception | None:
    """Why this node does not hold the buffers of its ranks, or None. Waits for memory that ended ranks still hold."""
    total, need = memory_limit(), f"checkpoints are copied to host memory first: the {ranks} ranks of this node need"
    if num_bytes > total:
        return TrainingError(
            f"{need} {num_bytes:,} bytes for that, and it has {total:,}; use more nodes or nodes with more memory"
        )
    deadline = time.monotonic() + FREED_WITHIN_S
    while num_bytes > (available := memory_available()):
        if time.monotonic() > deadline:
            return MemoryError(
                f"{need} {num_bytes:,} bytes for that, {available:,} are available; use more nodes, or nodes with more "
                "memory, or see what else holds it"
            )
        time.sleep(0.5)
    return None


def allocate(num_bytes: int) -> int:
    """Descriptor of that much shared memory, with every page there."""
    descriptor = os.memfd_create("tuneyard-checkpoint")
    os.posix_fallocate(descriptor, 0, num_bytes)
    return descriptor


def current_gpu() -> int | None:
    """Number of the GPU that this thread uses, or None without one."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else None


def copy_stream() -> Any:
    """A stream of this thread's GPU, None without one. A buffer keeps its own: what copies in another type take of the
    device for a while stays with their stream."""
    import torch

    return torch.cuda.Stream() if torch.cuda.is_available() else None


def lock_pages(mapped: mmap.mmap, for_gpu: bool) -> None:
    """Map every page, and page-lock them for a GPU, which doubles the speed of copies from it."""
    import torch

    first_bytes = np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE]
    np.bitwise_or(first_bytes, 0, out=first_bytes)  # without Python's lock, which mmap's own populating would hold
    if for_gpu:
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
