"""What the masks of a batch hold, as the host knows it, so that a forward pass need not ask a GPU and wait.

transformers leaves attention masks out where they would mask nothing. To find that out it reads padding and positions
on the device, once a forward pass or more. Within `masks_known` it is told instead; the masks are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class MaskFacts:
    """Of one batch."""

    padded: bool
    """Whether its attention mask leaves a position out."""
    restarts: bool
    """Whether positions begin anew within a row, as those of packed documents do."""


_facts: ContextVar[MaskFacts | None] = ContextVar("mask_facts", default=None)


@contextmanager
def masks_known(facts: MaskFacts) -> Iterator[None]:
    """For forward passes over one batch."""
    _teach_transformers()
    token = _facts.set(facts)
    try:
        yield
    finally:
        _facts.reset(token)


def say_bounds(tensor: Any, bounds: Any) -> Any:
    """The tensor, which from now on knows its numbers on the host too."""
    tensor.on_host = bounds.tolist()
    return tensor


def bounds_on_host(bounds: Any) -> list[int]:
    """Where documents begin in a row, and its end; asked of the device where `say_bounds` did not say so."""
    known: list[int] | None = getattr(bounds, "on_host", None)
    return bounds.tolist() if known is None else known


@cache
def _teach_transformers() -> None:
    from transformers import AttentionMaskInterface, masking_utils

    for name, makes in tuple(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.items()):
        if makes in (masking_utils.sdpa_mask, masking_utils.flash_attention_mask):
            AttentionMaskInterface.register(name, _asking_the_host(makes))
    masking_utils.find_packed_sequence_indices = _packed_as_known(masking_utils.find_packed_sequence_indices)


def _asking_the_host(makes: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of masks that knows whether there is padding."""

    def make(*args: Any, attention_mask: Any = None, **given: Any) -> Any:
        facts = _facts.get()
        if facts is not None and attention_mask is not None:
            if facts.padded:
                given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            else:
                attention_mask = None
        return makes(*args, attention_mask=attention_mask, **given)

    return make


def _packed_as_known(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The number of each position's document; None where each row is one."""

    def find_documents(position_ids: Any) -> Any:
        facts = _facts.get()
        if facts is None:
            return find(position_ids)
        if not facts.restarts:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    return find_documents
