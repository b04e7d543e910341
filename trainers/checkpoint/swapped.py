"""State that DeepSpeed keeps on disk: where a parameter's values lie between two updates, and how to change them.

A swap file holds a flat tensor, raw, of a group of parameters. Knows the swappers of
DeepSpeed 0.19 and nothing of checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SwapSpan:
    """Values that lie in a swap file."""

    path: str
    start: int
    """The first one, counted in values."""
    dtype: Any

    def read(self, start: int, end: int) -> Any:
        """Values [start, end) of the span. Raises OSError where the file is shorter."""
        import torch

        values = torch.empty(end - start, dtype=self.dtype)
        raw = memoryview(values.view(torch.uint8).numpy())
        with Path(self.path).open("rb", buffering=0) as file:
            file.seek((self.start + start) * self.dtype.itemsize)
            found = file.readinto(raw)
        if found != len(raw):
            raise OSError(f"the swap file {self.path} ends too early: {found} bytes in place of {len(raw)}")
        return values


def state_span(optimizer: Any, parameter: Any, kind: str) -> SwapSpan | None:
    """Where a trainable parameter's weight or moment lies on disk; None where it is in memory."""
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    if not optimizer._swappable_optimizer_subgroup(group):
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    name = flat.ds_id if kind == "weight" else f"{kind}-{flat.ds_id}"
    return SwapSpan(f"{optimizer.optimizer_swapper.swap_folder}/{name}.tensor.swp", offset, flat.dtype)


def on_disk(parameter: Any) -> bool:
    """Whether a parameter's working partition is kept on disk."""
    return getattr(getattr(parameter, "ds_tensor", None), "final_location", None) == "nvme"


@contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[Any]:
    """The flat weights of a group and, in the optimizer's state, its moments, to be changed; whatever is kept on disk
    is written back. Working weights follow."""
    swapped = optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield optimizer.fp32_partitioned_groups_flat[group]
    optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)
