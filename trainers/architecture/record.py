"""The record of what a configuration tells. Each line is a property of its own in `config.py`."""

from dataclasses import dataclass
from typing import Any

from trainers.architecture.config import (
    is_tied,
    kinds_of_layers,
    layer_drop,
    num_layers,
    positions,
    router_loss_weight,
    text_config,
    token_types,
    vocabulary,
    width,
)


@dataclass(frozen=True)
class Architecture:
    """What a configuration tells of a model."""

    family: str
    layers: int
    width: int
    vocabulary: int
    positions: int | None
    """Longest sequence that the configuration names; None where it names none."""
    kinds_of_layers: tuple[str, ...]
    """Such as full_attention, sliding_attention, linear_attention; empty where all are alike."""
    token_types: int
    layer_drop: float
    router_loss: float
    tied: bool
    is_nested: bool
    """Whether the text model stands inside another, beside vision or audio."""


def describe(config: Any) -> Architecture:
    """The record of a configuration."""
    text = text_config(config)
    return Architecture(
        family=str(config.model_type),
        layers=num_layers(config),
        width=width(config),
        vocabulary=vocabulary(config),
        positions=positions(config),
        kinds_of_layers=tuple(dict.fromkeys(map(str, kinds_of_layers(text)))),
        token_types=token_types(config),
        layer_drop=max(layer_drop(config)),
        router_loss=router_loss_weight(config),
        tied=is_tied(config),
        is_nested=text is not config,
    )
