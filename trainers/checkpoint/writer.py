"""The process beside each rank that puts its checkpoints on storage. Starts without torch, in a third of a second.

It reads the rank's state out of shared memory and hears of each save by a line on its standard input, whose length of
JSON then stands in a second piece of shared memory: a pipe that fills up would hold the rank back. It answers with a
line on its standard output. When its input closes the rank is gone, and it goes too, even in the middle of a file.
"""

import contextlib
import mmap
import os
import queue
import sys
import threading
import time
from functools import partial

from trainers.checkpoint.records import COMMITTED, SaveReport, SaveRequest, Vote
from trainers.checkpoint.writing import cast_vote, commit, read_vote, write_share
from trainers.storage import Folder

NICENESS = 19
"""The steps come first: a saturated processor gives this process 1.5 % of itself."""


def carry_out(request: SaveRequest, data: memoryview, hurry: threading.Event) -> SaveReport:
    """Write, vote and, on rank 0, commit. Where storage refuses, that checkpoint is lost and its folder is removed."""
    folder, save = Folder(request.folder), request.save
    try:
        vote = _vote(folder, request, data, hurry)
        if request.state is None:
            return SaveReport(step=request.step, error=vote.error)
        done = commit(folder, vote, save.world_size, request.state, request.history)
        return SaveReport(step=request.step, bytes=done, at=time.monotonic())
    except OSError as error:
        if save.rank == 0 and not folder.exists(COMMITTED):
            folder.delete()
        return SaveReport(step=request.step, error=str(error))


def _vote(folder: Folder, request: SaveRequest, data: memoryview, hurry: threading.Event) -> Vote:
    """This rank's vote; one that a writer cast before it died stands."""
    cast = read_vote(folder, request.save)
    if cast is not None:
        return cast
    refusal = f"{folder} is committed already" if folder.exists(COMMITTED) else request.refusal
    if refusal is None:
        hurry.wait(request.settle_s)
        rest = partial(_rest, hurry, request.rest)
        return write_share(folder, request.save, data, request.total_bytes, rest)
    return cast_vote(folder, request.save, Vote(save=request.save.id, error=refusal))


def _rest(hurry: threading.Event, times: float, worked_s: float) -> None:
    """Leave the machine to the steps for a while, unless the rank waits."""
    hurry.wait(worked_s * times)


def _listen(lengths: "queue.Queue[int]", hurry: threading.Event) -> None:
    """Pass on each request's length, or with 0 that the rank waits; end the process when the rank has ended."""
    for line in sys.stdin:
        if length := int(line):
            hurry.clear()
            lengths.put(length)
        else:
            hurry.set()
    os._exit(1)


def main(data_descriptor: int, request_descriptor: int) -> None:
    """Serve one rank for as long as it lives."""
    os.nice(NICENESS)
    with mmap.mmap(data_descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
        lengths: queue.Queue[int] = queue.Queue()
        hurry = threading.Event()
        threading.Thread(target=_listen, args=(lengths, hurry), daemon=True).start()
        while True:
            request = SaveRequest.model_validate_json(os.pread(request_descriptor, lengths.get(), 0))
            report = carry_out(request, data, hurry)
            with contextlib.suppress(BrokenPipeError):  # the rank has ended meanwhile, as `_listen` is about to find
                print(report.model_dump_json(), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
