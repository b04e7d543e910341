"""The weights of an exported folder, one at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from trainers.pretrained import weight_files


def exported_weights(folder: Path, opened: ExitStack) -> dict[str, Callable[[], Any]]:
    """A function for each weight by its published name, which reads it as a torch tensor in the type it was stored in.

    Args:
        opened: what closes the files.
    """
    from safetensors import safe_open

    weights: dict[str, Callable[[], Any]] = {}
    for path in weight_files(folder):
        file = opened.enter_context(safe_open(path, "pt"))
        weights |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    return weights
