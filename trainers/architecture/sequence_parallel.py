"""Sequence parallelism: ranks that share each sequence, a part of its positions on each (DeepSpeed Ulysses: Jacobs et
al. 2023, arXiv:2309.14509).

All of a transformer but attention looks at one position at a time, so a rank computes its own part. For attention the
ranks of a group exchange: from all heads of own positions to own heads of all positions, and back. Weights, gradients
and optimizer state stay spread over all ranks, as without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from trainers.architecture.config import router_loss_weight, text_config
from trainers.architecture.model import SHARED, stateful_layers


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences with this one."""

    size: int
    place: int
    """Of this rank among them: it has the positions of that part."""
    ranks: Any = field(repr=False)
    """torch's process group of them."""

    def own_heads(self, states: Any) -> Any:
        """From [1, heads, part of the positions, width] to [1, own heads, all positions, width]."""
        _, heads, part, width = states.shape
        sent = states.reshape(self.size, heads // self.size, part, width)
        return _exchange(sent, self).transpose(0, 1).reshape(1, heads // self.size, self.size * part, width)

    def own_positions(self, states: Any) -> Any:
        """From [1, all positions, own heads, width] to [1, part of the positions, heads, width]."""
        _, positions, heads, width = states.shape
        sent = states.reshape(self.size, positions // self.size, heads, width)
        return _exchange(sent, self).transpose(0, 1).reshape(1, positions // self.size, self.size * heads, width)

    def whole(self, part: Any) -> Any:
        """Every rank's [1, part of the positions, ...] as [1, all positions, ...], without a gradient."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.ranks)
        return torch.cat(parts, 1)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by place."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.ranks)
        return values


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    """The i-th slice of each rank goes to rank i: what it undoes is itself, so it is its own gradient."""

    @staticmethod
    def forward(ctx: Any, sent: Any, group: SequenceGroup) -> Any:
        ctx.group = group
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent.contiguous(), group=group.ranks)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _exchange(gradient, ctx.group), None


def _exchange(sent: Any, group: SequenceGroup) -> Any:
    return _Exchange.apply(sent, group)


_own: list[SequenceGroup] = []
"""This process's, once it has joined one."""


def join_group(rank: int, world_size: int, size: int) -> SequenceGroup:
    """Share sequences with the ranks beside this one; every rank calls it alike."""
    _own.clear()
    for first in range(0, world_size, size):
        ranks = dist.new_group(list(range(first, first + size)))
        if first <= rank < first + size:
            _own.append(SequenceGroup(size, rank - first, ranks))
    return _own[0]


def group_of(inputs: Mapping[str, Any]) -> SequenceGroup | None:
    """Who has the other parts of a batch's sequences; None where it is whole."""
    return _own[0] if SHARED in inputs else None


def shared_states(group: SequenceGroup, query: Any, key: Any, value: Any, sinks: Any) -> tuple[Any, Any, Any, Any]:
    """What attention over all positions needs of this rank's heads.

    Args:
        query: [1, heads, part of the positions, width]; heads of key and value that the ranks cannot divide among
            themselves go to several of them.
        sinks: [heads] or None.
    """
    heads, fewer = query.shape[1], key.shape[1]
    if fewer % group.size:
        times = (heads if group.size % fewer else group.size) // fewer
        key, value = (states.repeat_interleave(times, 1) for states in (key, value))
    if sinks is not None:
        sinks = sinks.view(group.size, -1)[group.place]
    return *(group.own_heads(states) for states in (query, key, value)), sinks


def sharing_obstacle(config: Any, empty: Any, ranks: int) -> str | None:
    """Why so many ranks cannot share sequences of a model, or None.

    Args:
        empty: the model, maybe on the meta device.
    """
    heads = getattr(text_config(config), "num_attention_heads", None)
    if not isinstance(heads, int):
        return "its configuration does not say how many attention heads it has"
    if heads % ranks:
        fitting = [size for size in range(1, heads + 1) if heads % size == 0]
        return f"its {heads} attention heads do not divide by {ranks}; it may be one of {fitting}"
    if stateful_layers(empty):
        return "it has layers that carry a state from token to token"
    if router_loss_weight(config) > 0:
        return "the loss that balances its experts is a mean over whole sequences (output_router_logits)"
    return None


def sharing_heads(config: Any, empty: Any) -> int:
    """Heads that ranks which share a sequence divide among themselves; 0 where they cannot share it."""
    return 0 if sharing_obstacle(config, empty, 1) else int(text_config(config).num_attention_heads)
