"""Before the first step of layers in tiles: does each look at one position at a time, as tiles take for granted?"""

from typing import Any

import torch

from trainers.errors import TrainingError
from trainers.model.tiles import tiled_layers
from trainers.verification.isolation import ALIKE, evaluating

POSITIONS = 8


def check_tiles(engine: Any, width: int, dtype: str, device: Any) -> None:
    """Give one layer of each kind random states, whole and in two parts, and compare. Every rank calls this alike.

    Args:
        width: of a hidden state.

    Raises:
        TrainingError: where a layer's output at a position depends on others.
    """
    states = torch.randn(1, POSITIONS, width, generator=torch.Generator().manual_seed(0)).to(
        device, getattr(torch, dtype)
    )
    layers = {type(layer): layer for layer in tiled_layers(engine)}
    with evaluating(engine), torch.no_grad():
        for kind, layer in layers.items():
            whole = layer(states)
            parts = torch.cat([layer(states[:, :3].contiguous()), layer(states[:, 3:].contiguous())], 1)
            moved = float((parts - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
            if moved > ALIKE[dtype]:
                raise TrainingError(
                    f"train.feed_forward_tiles: {kind.__name__} does not look at each position by itself: in parts its "
                    f"output differs by {moved:.3g} of the largest. Set train.feed_forward_tiles: false"
                )
