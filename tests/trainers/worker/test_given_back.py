"""Freed memory goes back to the node where a rank says so, and its environment says nothing else; kernels made for one
shape are not kept by the hundred."""

import ctypes

import pytest

from tests.ranks import run_ranks
from trainers.host_memory import give_freed_memory_back
from trainers.model.memory import GIVE_BACK_BYTES
from trainers.model.world import KERNEL_CACHES, KERNELS_KEPT, pick_device


class MallInfo(ctypes.Structure):
    """Of glibc's malloc.h."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usm", "fsm", "uord", "ford", "keep")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def own_mappings(count: int) -> int:
    """How many tensors of 100 KiB the C library puts in mappings of their own, which go when they are freed."""
    import torch

    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    before = ask().hblks
    held = [torch.empty(100 * 1024, dtype=torch.uint8) for _ in range(count)]
    mapped = int(ask().hblks - before)
    del held
    return mapped


def asked_and_counted(environment: bool) -> tuple[int, int]:
    import os

    as_it_comes = own_mappings(50)
    if environment:
        os.environ["MALLOC_ARENA_MAX"] = "1"
    give_freed_memory_back(GIVE_BACK_BYTES)
    return as_it_comes, own_mappings(500)


@pytest.mark.parametrize("environment", [False, True])
def test_freed_tensors_go_back_unless_the_environment_says_how_memory_is_allocated(environment: bool) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the C library is not glibc from 2.33 on")
    ((before, after),) = run_ranks(asked_and_counted, 1, environment)
    assert before == 0 and (after == 0 if environment else after > 400)  # some find room in what was freed


def held_for_kernels(bound: bool) -> tuple[int, int]:
    """Bytes that are in use after products in 16 bits of `KERNELS_KEPT` shapes, and of eight times as many."""
    import os

    import torch

    for cache in KERNEL_CACHES:  # a test that ran before in pytest's process may have set them there
        os.environ.pop(cache, None)
    if bound:
        pick_device(0, 1)
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    rows, weight = torch.ones(8 * KERNELS_KEPT, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    before, held = ask(), []
    for shape in range(1, len(rows) + 1):
        torch.mm(rows[:shape], weight)
        if shape in (KERNELS_KEPT, len(rows)):
            now = ask()
            held.append(int(now.uord + now.hblkhd - before.uord - before.hblkhd))
    return held[0], held[1]


def test_texts_of_all_lengths_leave_no_kernel_for_each() -> None:
    """Where the processor has none for 16 bits, nothing is held either way. With AMX it is 0.6 MB a shape."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the C library is not glibc from 2.33 on")
    ((few, many),) = run_ranks(held_for_kernels, 1, True)
    assert many <= 1.5 * few + 2**20
    ((few, many),) = run_ranks(held_for_kernels, 1, False)
    assert few < 2**20 or many > 4 * few  # what the bound is for
