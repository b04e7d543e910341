"""Layers that carry a state from token to token (convolutions, state-space models, linear attention), over each of a
pack's documents alone: where a document begins, the state is nothing of the one before.

So packs need no kernels that know the bounds of documents. transformers' own way, which needs them, is left as it is
where the attention backend is another than `documents`.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from trainers.architecture.model import stateful_layers
from trainers.known_masks import bounds_on_host

SAID = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that tell where documents begin."""


def keep_states_apart(model: Any) -> None:
    """Have each layer that carries a state along compute a pack's documents one by one, where the model is told their
    bounds; in place."""
    layers: list[Any] = stateful_layers(model)
    spans: list[tuple[int, int]] = []
    idle: list[int] = [0]

    def note_bounds(module: Any, args: Any, kwargs: Any) -> None:
        bounds = kwargs.get("cu_seq_lens_q")
        spans[:] = (
            [] if bounds is None else [(begin, end) for begin, end in pairwise(bounds_on_host(bounds)) if end > begin]
        )
        idle[0] = _most_calls(model, len(spans), bounds.device) - len(spans) if spans else 0

    if layers:
        model.keeps_states_apart = True
        model.register_forward_pre_hook(note_bounds, with_kwargs=True)
    for layer in layers:
        layer.forward = _one_by_one(layer.forward, spans, idle)


def _most_calls(model: Any, calls: int, device: Any) -> int:
    """Calls of the rank with the most documents, where parameters are partitioned: each call gathers them, and no rank
    may be left alone with it."""
    if not dist.is_initialized() or not any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return calls
    most = torch.tensor(calls, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _one_by_one(forward: Callable[..., Any], spans: list[tuple[int, int]], idle: list[int]) -> Callable[..., Any]:
    """A layer's forward pass over each span of the one row, the results put together; idle calls count nothing."""

    @functools.wraps(forward)
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # or each set of lengths would be compiled
    def run(*args: Any, **kwargs: Any) -> Any:
        if not spans:
            return forward(*args, **kwargs)

        def part(value: Any, begin: int, end: int) -> Any:
            is_whole = isinstance(value, torch.Tensor) and value.shape[:2] == (1, spans[-1][1])
            return value[:, begin:end] if is_whole else value

        def compute(span: tuple[int, int]) -> Any:
            given = {name: part(value, *span) for name, value in kwargs.items() if name not in SAID}
            return forward(*(part(value, *span) for value in args), **given)

        found = [compute(span) for span in spans]
        for _ in range(idle[0]):
            found[-1] = found[-1] + 0.0 * compute(spans[-1])
        return torch.cat(found, 1)

    return run
