"""Parameter groups of the optimizer: who decays, and how fast each layer learns."""

from collections import defaultdict
from typing import Any

from trainers.architecture import LAYER, STACK


def parameter_groups(model: Any, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of trainable parameters: matrices decay, biases and norms (fewer than two dimensions) do not.

    With a layer decay below 1 each depth has groups of its own, whose `lr_scale` the loop multiplies the rate with: 1
    for the head, layer_decay for the last layer, one factor less for each layer below it, and one more for embeddings.
    """
    depths = layer_depths(model)
    groups: dict[tuple[float, float], list[Any]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            groups[weight_decay if matrix else 0.0, layer_decay ** depths[name]].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def layer_depths(model: Any) -> dict[str, int]:
    """How many layers lie above each parameter: 0 for the head, 1 for a stack's last layer, the most for embeddings."""
    places = {name: _place(name) for name, _ in model.named_parameters()}
    heights: dict[str, int] = defaultdict(int)
    for stack, layer in filter(None, places.values()):
        heights[stack] = max(heights[stack], layer + 1)
    deepest = max(heights.values(), default=0) + 1
    embeddings = {id(parameter) for parameter in _embeddings(model)}
    return {
        name: heights[place[0]] - place[1]
        if (place := places[name])
        else (deepest if id(parameter) in embeddings or "embed" in name else 0)
        for name, parameter in model.named_parameters()
    }


def _place(name: str) -> tuple[str, int] | None:
    """The stack a parameter's layer belongs to and the layer's number in it; None outside layers."""
    found = LAYER.search(name)
    if not found:
        return None
    stack = STACK.search(name)
    return (stack.group(1) if stack else ""), int(found.group(1))


def _embeddings(model: Any) -> list[Any]:
    embedding = model.get_input_embeddings()
    return [] if embedding is None else list(embedding.parameters())
