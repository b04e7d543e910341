"""Runs a function on several gloo ranks, each a process of its own, and gives back what each returned.

Ranks are forks of one server that has imported what they need: importing anew takes two of them 8 s at each launch.
A CUDA context does not survive a fork, so machines with a GPU start every rank anew.
"""

import atexit
import multiprocessing
import multiprocessing.util  # what it does at the exit comes after what is registered below
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.training.node_report import free_port

START_S = 540


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, patience_s: float = START_S) -> list[Any]:
    """Results of `function(*arguments)` by rank; raises where any rank did, with its traceback.

    The function must stand at the top of a module. The launcher contract's variables are set before it is called.
    """
    context = rank_context()
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_enter, args=(function, rank, world_size, port, results, arguments, dict(os.environ)), daemon=True
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    found: dict[int, Any] = {}
    failures = []
    for _ in ranks:
        rank, value, failure = results.get(timeout=patience_s)
        found[rank] = value
        if failure:
            failures.append(f"rank {rank}:\n{failure}")
            break
    for process in ranks:
        if failures:
            process.kill()
        process.join(timeout=30)
    if failures:
        raise AssertionError("\n".join(failures))
    return [found[rank] for rank in range(world_size)]


def rank_context() -> Any:
    """What starts a rank's process."""
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_ahead"])
    return context


@atexit.register
def _kill_those_left() -> None:
    """Processes that a failed test has left: multiprocessing would wait for them, and pytest not end."""
    for process in multiprocessing.active_children():
        process.kill()


def _enter(
    function: Any, rank: int, world_size: int, port: int, results: Any, arguments: Any, environment: dict[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # gloo's threads would keep a rank whose peer is gone
