"""What ranks say to each other in a step: collectives as torch dispatches them, and the bytes a rank sends for them."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2, "reduce": 1}
"""How often a ring passes on (world size - 1) / world size of the whole tensor."""
LEAST_BYTES = 128
"""Below this they are norms, losses and votes."""


class Messages(TorchDispatchMode):
    """Messages of tensors by kind, and the bytes of whole tensors that a ring passes on for them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._schema.name.removeprefix("c10d::"), (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, given: Any) -> None:
        whole = max((leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)), default=0)
        if whole > LEAST_BYTES:
            kind = name.replace("_allgather_base", "allgather").replace("_reduce_scatter_base", "reduce_scatter")
            kind = kind.strip("_")
            self.counts[kind] += 1
            self.bytes += PARTS[kind] * whole
