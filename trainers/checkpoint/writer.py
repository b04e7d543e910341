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
from collections.abc import Callable

from trainers.checkpoint.records import COMMITTED, SaveReport, SaveRequest, Vote
from trainers.checkpoint.writing import cast_vote, commit, find_refusal, read_vote, write_share
from trainers.patience import retrying
from trainers.storage import Folder

NICENESS = 19
"""The steps come first: a saturated processor gives this process 1.5 % of itself."""


def carry_out(request: SaveRequest, data: memoryview, hurry: threading.Event, sign: Callable[[], object]) -> SaveReport:
    """Write, vote and, on rank 0, commit. Where storage refuses, that checkpoint is lost and its folder is removed.

    Args:
        hurry: set while the rank waits; then nobody rests.
        sign: called now and then, to show that the work goes on.
    """
    folder, save = Folder(request.folder), request.save
    try:
        vote = _vote(folder, request, data, hurry, sign)
        if request.state is None:
            return SaveReport(step=request.step, error=vote.error)
        done = commit(folder, vote, save.world_size, request.state, request.history, sign)
        return SaveReport(step=request.step, bytes=done, at=time.monotonic())
    except OSError as error:
        return SaveReport(step=request.step, error=f"{error}{_remove(folder) if save.rank == 0 else ''}")


def _remove(folder: Folder) -> str:
    """Remove a checkpoint that could not be committed; what is to be said where that is refused too."""
    from trainers.checkpoint.cleaning import take_away  # needed here alone, and with it comes the job's schema

    try:
        if COMMITTED not in retrying(folder.list, f"listing {folder}"):
            take_away(folder)()
    except OSError as error:
        return f"; what is left of it stays: {error}"
    return ""


def _vote(
    folder: Folder, request: SaveRequest, data: memoryview, hurry: threading.Event, sign: Callable[[], object]
) -> Vote:
    """This rank's vote; one that a writer cast before it died stands."""

    def rest(worked_s: float) -> None:
        """Leave the machine to the steps for a while."""
        sign()
        hurry.wait(worked_s * request.rest)

    cast = read_vote(folder, request.save)
    if cast is not None:
        return cast
    if request.written is not None:
        return cast_vote(folder, request.save, request.written)
    refusal = find_refusal(folder) or request.refusal
    if refusal is None:
        hurry.wait(request.settle_s)
        return write_share(folder, request.save, data, request.total_bytes, rest)
    return cast_vote(folder, request.save, Vote(save=request.save.id, error=refusal))


def _listen(lengths: "queue.Queue[int]", hurry: threading.Event) -> None:
    """Pass on each request's length, or with 0 that the rank waits; end the process when the rank has ended."""
    for line in sys.stdin:
        if length := int(line):
            hurry.clear()
            lengths.put(length)
        else:
            hurry.set()
    os._exit(1)


def _say(line: str = "") -> None:
    with contextlib.suppress(BrokenPipeError):  # the rank has ended meanwhile, as `_listen` is about to find
        os.write(1, f"{line}\n".encode())


def main(data_descriptor: int, request_descriptor: int) -> None:
    """Serve one rank for as long as it lives."""
    os.nice(NICENESS)
    with mmap.mmap(data_descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
        lengths: queue.Queue[int] = queue.Queue()
        hurry = threading.Event()
        threading.Thread(target=_listen, args=(lengths, hurry), daemon=True).start()
        while True:
            request = SaveRequest.model_validate_json(os.pread(request_descriptor, lengths.get(), 0))
            _say(carry_out(request, data, hurry, _say).model_dump_json())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
