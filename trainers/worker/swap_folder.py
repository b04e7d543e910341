"""What state on disk takes of a node: DeepSpeed's async I/O, which is built there, and a folder of each rank's own.
Begin at `swap_files`."""

import fcntl
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainers.checkpoint.swapped import on_disk
from trainers.errors import JobError
from trainers.host_memory import give_freed_memory_back
from trainers.model.deepspeed_config import disk_sections
from trainers.model.memory import GIVE_BACK_BYTES
from trainers.model.world import World, has_driver

PROBE = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }"
BUILT = "deepspeed.ops.aio.async_io_op"
"""Where DeepSpeed was installed with it built (DS_BUILD_AIO=1)."""


def async_io_problem() -> str | None:
    """What this machine lacks of what state on disk takes, or None. DeepSpeed reads and writes swap files through an
    extension that it builds at first use, in minutes."""
    if find_spec(BUILT) is not None:
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    ninja = shutil.which("ninja", path=_search_path())
    lacks = [] if compiler else ["a C++ compiler (Debian, Ubuntu: apt install g++)"]
    lacks += [] if ninja else ["ninja (pip install ninja)"]
    if compiler and not compiles(compiler):
        lacks.append("libaio with its headers (Debian, Ubuntu: apt install libaio-dev; Fedora: libaio-devel)")
    if has_driver() and not _finds_cuda():
        lacks.append("the CUDA toolkit with nvcc, of torch's version (CUDA_HOME names its folder)")
    if not lacks:
        return None
    return (
        "train.deepspeed: state on disk is read and written by DeepSpeed's async I/O, which is built on each node; "
        f"{socket.gethostname()} lacks {', '.join(lacks)}. Install it, or take zero3-cpu-offload"
    )


def _finds_cuda() -> bool:
    """Whether torch has no CUDA, or knows where the toolkit is: DeepSpeed builds with it where there is a GPU."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.version.cuda is None or (CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists())


def _search_path() -> str:
    """PATH behind the folder of this Python's programs: another version of ninja would build all again."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def compiles(compiler: str) -> bool:
    """Whether a program that uses libaio can be built."""
    command = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    return subprocess.run(command, input=PROBE.encode(), capture_output=True, check=False).returncode == 0


def build_async_io() -> None:
    """Build and load the extension, one process of a node after the other. torch keeps others out by a file, which
    stays where a build was killed, and would be waited for without end: whoever holds our lock removes it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    os.environ["PATH"] = _search_path()
    folders = [Path(_get_build_directory(name, verbose=False)) for name in ("pin_memory", "async_io")]
    with (folders[0].parent / "tuneyard.lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        if not (folders[1] / "async_io.so").exists():
            logging.getLogger(__name__).warning("building DeepSpeed's async I/O on this node, once: that takes minutes")
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        AsyncIOBuilder().load(verbose=False)


def check_frozen(engine: Any) -> None:
    """Raises JobError where frozen weights are on disk: from the third step on DeepSpeed 0.19 computed with others."""
    frozen = [name for name, each in engine.module.named_parameters() if not each.requires_grad and on_disk(each)]
    if frozen:
        raise JobError(
            f"train.deepspeed: {len(frozen)} frozen weights ({frozen[0]}) would be on disk, where DeepSpeed mixes them "
            "up with others; name a file of your own that keeps the optimizer's state there and weights in host memory "
            '(offload_param: {"device": "cpu"}), or train all weights'
        )


@contextmanager
def swap_files(config: dict[str, Any], largest: Callable[[], int], run: str, world: World) -> Iterator[dict[str, Any]]:
    """The configuration with this rank's own folder and buffers as large as they must be; the folder goes at the end.
    Who keeps state on disk is short of memory, so freed memory is given back at once.

    Args:
        largest: values of the model's largest parameter; not asked where nothing depends on it.
        run: the run's name: runs that share a disk stay apart, and what a killed launch left is removed.
    """
    sections = disk_sections(config["zero_optimization"])
    if not sections:
        yield config
        return
    give_freed_memory_back(GIVE_BACK_BYTES)
    build_async_io()
    runs = {Path(section["nvme_path"]) / run for section in sections}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for folder in runs:
            shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    for section in sections:
        section["nvme_path"] = str(Path(section["nvme_path"]) / run / f"rank-{world.rank}")
        Path(section["nvme_path"]).mkdir(parents=True, exist_ok=True)
    if param := config["zero_optimization"].get("offload_param"):
        param.setdefault("buffer_size", -(-largest() // world.size) + 4096)  # aligned to 1 KiB a thread
    try:
        yield config
    finally:
        for section in sections:
            shutil.rmtree(section["nvme_path"], ignore_errors=True)
        for folder in runs:
            with suppress(OSError):  # another rank still has its own
                folder.rmdir()
