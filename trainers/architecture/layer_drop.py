"""Layers dropped at random while training (`layerdrop`, as in M2M-100 and NLLB), alike on all ranks.

transformers leaves a layer out where `torch.rand([]) < rate`, each rank by its own draw; then the ranks' collectives no
longer match. Here the draw comes from (seed, step): the same layers on every rank and in every micro-batch of a step.
"""

from typing import Any

import numpy as np

from trainers.architecture import dropping_stacks, plain_model


class SharedRate:
    """A rate that draws by itself: Python asks the right side where a tensor does not know how to compare with it."""

    def __init__(self, rate: float, draws: "SharedDraws") -> None:
        self.rate, self._draws = rate, draws

    def __gt__(self, other: Any) -> bool:
        return self.rate > other if isinstance(other, float | int) else self._draws.next() < self.rate


class SharedDraws:
    """Numbers that are the same on every rank and in every micro-batch of a step."""

    def __init__(self) -> None:
        self.seed: tuple[int, int] = (0, 0)
        self._taken = 0

    def begin(self, *_: Any) -> None:
        """Start over: called before each forward pass."""
        self._taken = 0

    def next(self) -> float:
        self._taken += 1
        return float(np.random.default_rng([*self.seed, self._taken]).random())


def share_layer_drop(model: Any) -> None:
    """Make every rank drop the same layers; `seed_layer_drop` says which."""
    draws = SharedDraws()
    stacks = dropping_stacks(model)
    for stack in stacks:
        stack.layerdrop = SharedRate(stack.layerdrop, draws)
    if stacks:
        model.shared_draws = draws
        getattr(model, model.base_model_prefix).register_forward_pre_hook(draws.begin)


def seed_layer_drop(engine: Any, seed: int, step: int) -> None:
    """Draw the layers to drop from (seed, step)."""
    draws = getattr(plain_model(engine), "shared_draws", None)
    if draws is not None:
        draws.seed = (seed, step)
