"""How many ranks run, and on which nodes. Pure: the controller measures, this decides."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.deepspeed_config import job_batches


@dataclass(frozen=True)
class Slots:
    """What a node could hold."""

    node: str
    slots: int
    """Ranks that fit on it."""


def slots_of(resources: Mapping[str, float], cpus: int, gpus: int) -> int:
    """Ranks that fit into a node's resources."""
    fit = int(resources.get("CPU", 0.0) // cpus)
    return min(fit, int(resources.get("GPU", 0.0) // gpus)) if gpus else fit


def fitting_sizes(job: Job) -> list[int]:
    """World sizes within scale.workers that keep the global batch, smallest first."""
    return [size for size in range(job.scale.min_workers, job.scale.max_workers + 1) if keeps_batch(job, size)]


def keeps_batch(job: Job, size: int) -> bool:
    """Whether the global batch can be cut for that many ranks."""
    try:
        job_batches(job, size)
    except JobError:
        return False
    return True


def assign_ranks(size: int, nodes: list[Slots]) -> dict[str, list[int]]:
    """Ranks by node: as few nodes as will do, the roomiest first, ranks of a node next to each other.

    Raises:
        ValueError: where the nodes hold fewer.
    """
    if sum(node.slots for node in nodes) < size:
        raise ValueError(f"{size} ranks do not fit on {nodes}")
    placed: dict[str, list[int]] = {}
    next_rank = 0
    for node in sorted(nodes, key=lambda node: -node.slots):
        count = min(node.slots, size - next_rank)
        if count:
            placed[node.node] = list(range(next_rank, next_rank + count))
        next_rank += count
    return placed


def largest_size(sizes: list[int], nodes: list[Slots]) -> int | None:
    """The largest world size that the nodes hold, or None."""
    room = sum(node.slots for node in nodes)
    return max((size for size in sizes if size <= room), default=None)


def with_room(sizes: list[int], free: Mapping[str, int], held: Mapping[str, int], most: int) -> list[Slots]:
    """Nodes that could hold ranks, the roomiest first.

    Args:
        free: ranks that fit beside everything that runs there now, by node.
        held: ranks that the group's own agents have room for. What is free beside them counts if the group grows by it.
        most: ranks of the whole group.
    """
    others = [Slots(node, min(slots, most)) for node, slots in free.items() if node not in held]
    as_held = [*others, *(Slots(node, slots) for node, slots in held.items())]
    grown = [*others, *(Slots(node, min(slots + free.get(node, 0), most)) for node, slots in held.items())]
    chosen = grown if (largest_size(sizes, grown) or 0) > (largest_size(sizes, as_held) or 0) else as_held
    return sorted(chosen, key=lambda candidate: (-candidate.slots, candidate.node))
