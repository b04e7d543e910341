"""Compilation of a model's layers by torch.compile: norms, rotations and gates of a layer become a few kernels.

Layers are compiled one by one, so all of one kind share their code, and hooks around them (activation checkpointing)
stay. What a layer computes in half precision is rounded less often than by its single operators.
"""

from typing import Any

from trainers.tasks import Task


def compile_layers(engine: Any, task: Task, length: int) -> None:
    """Compile the layers of a model at their first call, and let every batch of packs have the same length, since each
    other one would be compiled anew.

    Args:
        length: positions of the longest sequence.
    """
    import torch._dynamo
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in engine.modules() if isinstance(part, GradientCheckpointingLayer)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(layers) + 8)
    for layer in layers:
        layer.compile()
    task.options = task.options.model_copy(update={"pack_length": length})
