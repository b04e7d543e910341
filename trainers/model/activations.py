"""Activation checkpointing: layers keep their inputs alone and are computed again in the backward pass.

Chen et al. 2016 (arXiv:1604.06174). A layer draws the same dropout both times, so in fp32 the gradients are bit for bit
those without it.
"""

from typing import Any

from trainers.errors import JobError


def checkpoint_activations(model: Any, every: int, offload: bool) -> None:
    """Checkpoint every `every`-th layer of a model; the other layers keep all that they compute.

    Args:
        offload: hold the kept inputs in host memory.

    Raises:
        JobError: where the model's class does not support it.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    except (ValueError, AttributeError) as error:
        raise JobError(
            f"train.activation_checkpointing: {type(model).__name__} does not support it ({error}); leave it out"
        ) from error
    model.disable_input_require_grads()  # only reentrant checkpoints need gradients of frozen embeddings
