"""Why the ranks ended: the first that failed by itself, in its own words, and what to do about it. Pure.

When a rank dies, the others fail too, in a collective that timed out or lost its peer. Those are victims: shown is
who was not.
"""

import errno
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.training.node_report import RankExit
from trainers.errors import describe
from trainers.worker.stack_dump import code_line, parse_stacks

VICTIM = re.compile(
    r"connection (closed|reset)|peer closed|timed? ?out|ProcessGroup|NCCL|gloo|Broken pipe|DistBackendError|"
    r"store->|TCPStore|socket",
    re.IGNORECASE,
)
"""What a rank says whose peer has gone."""
CRASH = re.compile(r"^ +what\(\): +(.+)$", re.MULTILINE)
"""What C++ says of an exception that nobody caught."""
NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?", re.IGNORECASE)
SHM_FULL_BYTES = 16 * 2**20
OUT_OF_MEMORY = re.compile(r"out of memory|MemoryError|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Cause:
    """What the user is told."""

    rank: int
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}" + (f". {self.remedy}" if self.remedy else "")


def find_cause(exits: Sequence[RankExit]) -> Cause:
    """The cause among the ends of the ranks; at least one must have failed.

    A rank that was killed, or that raised something of its own, comes before one that lost its peers; of equals the
    first in time.
    """
    bad = [rank_exit for rank_exit in exits if rank_exit.code != 0]
    assert bad, "no rank failed"
    first = min(bad, key=lambda rank_exit: (is_victim(rank_exit), rank_exit.at))
    what, remedy = _explain(first)
    return Cause(first.rank, f"on {first.node} {what}", remedy)


def lasting_error(exits: Sequence[RankExit]) -> str | None:
    """What a rank raised, and where, if the same can come again: no storage, memory or lost peer stands behind it.
    Without its numbers: addresses, times and ports differ from launch to launch."""
    own = [end.failed for end in exits if end.failed and not end.failed.may_pass and not is_victim(end)]
    return f"{NUMBER.sub('#', describe(own[0].error))} at {own[0].where}" if own else None


def is_victim(rank_exit: RankExit) -> bool:
    """Whether a rank says no more than that its peers are gone."""
    if rank_exit.failed is None:
        return False
    own = rank_exit.failed.errno in (errno.ENOSPC, errno.ENOMEM)
    return not own and bool(VICTIM.search(describe(rank_exit.failed.error)))


def _explain(rank_exit: RankExit) -> tuple[str, str]:
    if rank_exit.failed is not None:
        return _explain_exception(rank_exit)
    if rank_exit.code < 0:
        return _explain_signal(rank_exit)
    last = [line for line in rank_exit.log_tail.splitlines() if line.strip()][-1:]
    return f"ended with exit code {rank_exit.code}{': ' + last[0] if last else ''}", ""


def _explain_signal(rank_exit: RankExit) -> tuple[str, str]:
    name = signal.Signals(-rank_exit.code).name
    memory = f"{rank_exit.max_rss_bytes / 2**30:.1f} GiB"
    if name == "SIGKILL" and rank_exit.oom_kills:
        return (
            f"was killed by the kernel for memory (it held {memory})",
            "Lower train.micro_batch_size or data.max_length, use more workers, or give the container more memory",
        )
    if name == "SIGBUS" and 0 <= rank_exit.shm_free_bytes < SHM_FULL_BYTES:
        return "was killed by SIGBUS, and /dev/shm is full", SHM_REMEDY
    said = CRASH.search(rank_exit.log_tail)
    line = code_line(parse_stacks(rank_exit.log_tail)[-1:])
    what = f"was killed by {name}" + (f" at {line}" if line else "") + (f": {said[1].strip()}" if said else "")
    return what, MISMATCH_REMEDY if "collective mismatch" in what else ""


MISMATCH_REMEDY = "A rank left out a collective that the others took part in, or took part in another one"

SHM_REMEDY = "Give the container more shared memory (docker run --shm-size=8g, or an emptyDir of medium Memory)"


def _explain_exception(rank_exit: RankExit) -> tuple[str, str]:
    assert rank_exit.failed is not None
    error, number = describe(rank_exit.failed.error), rank_exit.failed.errno
    what = f"raised {error.strip().splitlines()[0]} at {rank_exit.failed.where}"
    if number == errno.ENOSPC or "No space left" in error:
        if 0 <= rank_exit.shm_free_bytes < SHM_FULL_BYTES:
            return f"found /dev/shm full: it {what}", SHM_REMEDY
        return f"found a disk full: it {what}", "Free space on the disk that it names, or lower checkpoint.keep"
    if OUT_OF_MEMORY.search(error):
        return what, "Lower train.micro_batch_size or data.max_length, or use more workers"
    if VICTIM.search(error):
        return what, "No rank says more than that its peers went: look at the network between the nodes"
    return what, ""
