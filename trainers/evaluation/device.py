"""What a model was computed on: where two of these are the same, the same model gives the same bits."""

from typing import Any


def computed_on(device: Any) -> str:
    """The kind of GPU, or the processor's instructions that torch uses, and torch's version.

    Args:
        device: torch.device.
    """
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
