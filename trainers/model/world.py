"""The launcher contract: five environment variables make a process a rank.

Our node agents, `accelerate launch` and `torchrun` all set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
nothing else of the launcher is known here.
"""

import gc
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trainers.compiler import has_triton
from trainers.errors import JobError
from trainers.host_memory import node_id

if TYPE_CHECKING:
    from trainers.architecture.sequence_parallel import SequenceGroup

T = TypeVar("T")
KERNELS_KEPT, KERNEL_CACHES = 64, ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Products of matrices in 16 bits whose kernels a CPU keeps, one for each shape: up to 0.7 MB each. Of torch's 1,024
the ranks of texts of all lengths would soon hold hundreds of MB, and find few of them again. The variables are those of
oneDNN's cache, and of torch's before it."""
CONTRACT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DRIVER = ("/dev/nvidiactl", "/dev/dxg")
"""Where NVIDIA's driver shows, the latter in Windows' subsystem for Linux."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: Any
    """torch.device of this rank."""
    group: "SequenceGroup | None" = None
    """The ranks that share sequences with this one; None where each has its own."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        shared = [value]
        dist.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value by rank, on every rank."""
        import torch.distributed as dist

        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        import torch
        import torch.distributed as dist

        arrived = torch.zeros(1, device=self.device)
        dist.all_reduce(arrived)
        float(arrived)  # on a GPU the call alone waits for nobody


def hide_gpus() -> None:
    """This process computes on the CPU whatever the machine has; call it before anything asks for a GPU."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


_claimed: list[int] = []
"""At most one: see `claim_gpu`."""


def claim_gpu(gpu: int) -> None:
    """This process computes from here on with one of the GPUs that it sees, and looks at no other.

    Args:
        gpu: as torch counts them.
    """
    import torch

    _claimed[:] = [gpu]
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)  # what names none means this one


def own_gpus() -> list[int]:
    """The GPUs that this process may use, as torch counts them: all that it sees, unless it has claimed one."""
    import torch

    return list(_claimed) or list(range(torch.cuda.device_count()))


def device_name(device: Any) -> str:
    """What kind of device it is: cpu, or a GPU by its name."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else str(device.type)


def pick_device(gpus_per_worker: int | Literal["auto"], threads: int | None = None) -> Any:
    """The torch.device this process computes on: where a worker takes no GPU the CPU, whatever the machine has; else
    the GPU of its local rank, if there is any.

    Args:
        gpus_per_worker: as the job says.
        threads: to compute with on the CPU; None leaves them.
    """
    import torch

    if gpus_per_worker != 0 and torch.cuda.is_available():
        has_triton()  # else torch would try kernels that cannot be built here
        own = own_gpus()
        return torch.device("cuda", own[int(os.environ.get("LOCAL_RANK", "0")) % len(own)])
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else sums depend on where in memory a weight happens to lie
    for cache in KERNEL_CACHES:
        os.environ.setdefault(cache, str(KERNELS_KEPT))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cpu")


def has_driver() -> bool:
    """Whether this machine has NVIDIA's driver, which containers without a GPU do not see."""
    return any(map(os.path.exists, DRIVER))


def check_gpus(gpus_per_worker: int | Literal["auto"]) -> None:
    """Refuse to compute on the CPU in silence where this machine's GPUs are asked for.

    Raises:
        JobError: where torch cannot use them, with its reason.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if gpus_per_worker == 0 or hidden or torch.cuda.is_available() or not has_driver():
        return
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    raise JobError(
        f"scale.gpus_per_worker: {socket.gethostname()} has NVIDIA's driver, but torch {torch.__version__} cannot use "
        f"a GPU there: {reason}; install a torch that goes with the driver (nvidia-smi tells its version), or set 0 to "
        "train on CPUs"
    )


def compute_deterministically() -> None:
    """Let every operator give the same bits each time, or raise; call it before anything asks for a GPU."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def join_world(threads: int, gpus_per_worker: int | Literal["auto"] = "auto", sharing: int = 1) -> World:
    """Become a rank: pick the device, set the thread count, and join the process group unless the launcher has.

    Args:
        sharing: ranks that share each sequence; divides their number.

    Raises:
        JobError: where the launcher's variables are missing, or torch cannot use the GPUs.
    """
    missing = [name for name in CONTRACT if name not in os.environ]
    if missing:
        raise JobError(
            f"not started by a launcher ({', '.join(missing)} unset): use `torchrun --nproc-per-node 2 -m trainers "
            "JOB`, `accelerate launch ... -m trainers JOB` or `tuneyard run JOB`"
        )
    import torch
    import torch.distributed as dist

    # DeepSpeed 0.19 calls names that torch 2.13 deprecates, some hundred times a step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # as peft asks transformers 5.23 for a name that it renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.modeling_utils")
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    check_gpus(gpus_per_worker)
    if gpus_per_worker == 0:
        hide_gpus()
    device = pick_device(gpus_per_worker, threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at DeepSpeed's import
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    if sharing == 1 or size % sharing:  # the latter is refused with the batch
        return World(rank, size, device)
    from trainers.architecture.sequence_parallel import join_group

    return World(rank, size, device, join_group(rank, size, sharing))


def share_cores(world: World) -> None:
    """Let this rank compute with its share of the node's cores, where it has a GPU and the cores little else to do: a
    collective. What is offloaded is updated by them, and the one thread that a worker has by default would take far
    longer for that than the GPU for the step."""
    if world.device.type == "cpu":
        return
    import torch

    ranks = world.gather(node_id()).count(node_id())
    torch.set_num_threads(max(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks))


def free_memory() -> None:
    """Give back what nothing refers to any more but by cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smallest_device(world: World) -> int | None:
    """Bytes of memory of the smallest rank's GPU; None where ranks compute on CPUs."""
    if world.device.type != "cuda":
        return None
    import torch
    import torch.distributed as dist

    total = torch.tensor(torch.cuda.get_device_properties(world.device).total_memory, device=world.device)
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    return int(total)
