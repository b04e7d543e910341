"""Feed-forward layers in tiles: a few thousand positions at a time, so that what passes through them need not fit for a
whole sequence (Bekman et al. 2025, arXiv:2506.13996).

Such a layer looks at one position at a time, and between its matrices a position has several times as many values as
outside. Only its input is kept; in the backward pass each tile is computed again, and gives its gradients. Those of the
weights are summed over tiles in fp32 and handed on once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainers.architecture import feed_forward_layers, plain_model
from trainers.errors import JobError

TILE = 4096
"""Positions."""


def tile_feed_forward(model: Any) -> None:
    """Let the feed-forward layers of a model compute in tiles; in place. Raises JobError where it has none."""
    layers = feed_forward_layers(model)
    if not layers:
        raise JobError(
            f"train.feed_forward_tiles: no feed-forward layers were found in {type(plain_model(model)).__name__} that "
            "look at each position by itself; leave it out"
        )
    for layer in layers:
        layer.forward, layer.untiled = _in_tiles(layer, layer.forward), layer.forward


def tiled_layers(model: Any) -> list[Any]:
    """The layers of a model that compute in tiles."""
    return [layer for layer in model.modules() if hasattr(layer, "untiled")]


def _in_tiles(layer: Any, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(states: Any) -> Any:
        if states.shape[0] * states.shape[1] <= TILE:
            return forward(states)
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        return _Tiled.apply(states, forward, *weights)

    return run


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, states: Any, compute: Callable[[Any], Any], *weights: Any) -> Any:
        """Args: states [batch, seq, width]."""
        ctx.save_for_backward(states)
        ctx.compute, ctx.weights, ctx.draws = compute, weights, _draws(states.device)
        with torch.no_grad():
            return torch.cat([compute(states[:, part].contiguous()) for part in _parts(states)], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (states,) = ctx.saved_tensors
        of_states = torch.empty_like(states)
        wide = [torch.promote_types(weight.dtype, torch.float32) for weight in ctx.weights]
        sums = [torch.zeros_like(weight, dtype=dtype) for weight, dtype in zip(ctx.weights, wide, strict=True)]
        with _drawn_again(states.device, ctx.draws):
            for part in _parts(states):
                with torch.enable_grad():
                    given = states[:, part].detach().contiguous().requires_grad_()
                    output = ctx.compute(given)
                found = torch.autograd.grad(output, [given, *ctx.weights], gradient[:, part])
                of_states[:, part] = found[0]
                for total, slope in zip(sums, found[1:], strict=True):
                    total += slope
        return of_states, None, *(total.to(weight.dtype) for total, weight in zip(sums, ctx.weights, strict=True))


def _parts(states: Any) -> Iterator[slice]:
    """Of the positions."""
    each = max(TILE // states.shape[0], 1)
    return (slice(start, start + each) for start in range(0, states.shape[1], each))


def _draws(device: Any) -> list[Any]:
    """Where random numbers stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _drawn_again(device: Any, draws: list[Any]) -> Iterator[None]:
    """Random numbers from there on, as they were drawn before; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(draws[0])
        for state in draws[1:]:
            torch.cuda.set_rng_state(state, device)
        yield
