"""Triton, whose kernels torch and our loss use on GPUs: for each it builds a stub in C, against Python's headers."""

import logging
import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def compiler_problem() -> str | None:
    """What this machine lacks to build Triton's stubs, or None."""
    scheme = sysconfig.get_default_scheme()  # on Debian posix_local, which has no headers
    where = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    headers = Path(where, "Python.h")
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)
    lacks = [] if compiler and shutil.which(compiler) else ["a C compiler (Debian, Ubuntu: apt install gcc)"]
    lacks += [] if headers.exists() else [f"{headers} (Debian, Ubuntu: apt install python3-dev)"]
    return " and ".join(lacks) or None


@cache
def has_triton() -> bool:
    """Whether this process computes with Triton's kernels: where they cannot be built, torch is told to do without."""
    if find_spec("triton") is None:
        return False
    problem = compiler_problem()
    if problem is None:
        return True
    logging.getLogger(__name__).warning("computing without Triton's kernels, slower: this machine lacks %s", problem)
    try:  # since torch 2.13 some of its own operators are such kernels
        from torch._native.triton_utils import deregister_op_overrides
    except ImportError:
        return False
    deregister_op_overrides()
    return False
