"""Tests that need a CUDA device. `TRY_GPU_TESTS=1` runs them on a CPU too, so that every line has run once."""

import os

import pytest


def has_gpu() -> bool:
    """Whether there is a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


MARKS = [pytest.mark.gpu]
if not os.environ.get("TRY_GPU_TESTS"):
    MARKS.append(pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no CUDA device"))
