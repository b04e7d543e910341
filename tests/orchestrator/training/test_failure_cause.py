"""Which rank's words the user reads, and what is said of each kind of end."""

import errno
import signal

from orchestrator.training.failure_cause import find_cause
from orchestrator.training.node_report import RankExit
from trainers.run.events import FailedEvent


def rank_exit(rank, code=1, at=0.0, error=None, number=None, **more):
    kind, _, message = (error or "").partition(": ")
    record = {"type": kind, "message": message, "exit_code": 1}
    failed = FailedEvent(error=record, errno=number, where="model.py:7 in forward") if error else None
    known = {"log_tail": "", "max_rss_bytes": 3 << 30, "oom_kills": 0, "shm_free_bytes": 1 << 30, "node": "n1"}
    return RankExit(rank=rank, code=code, at=at, failed=failed, **(known | more))


LOST_PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:5: Connection reset by peer"
TIMED_OUT = "DistBackendError: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 600000 ms"


def test_the_cause_comes_before_its_victims_even_where_it_was_heard_of_later():
    ends = [
        rank_exit(0, at=1.0, error=LOST_PEER),
        rank_exit(2, at=1.1, error=TIMED_OUT),
        rank_exit(1, at=2.0, error="ValueError: x"),
    ]
    cause = find_cause(ends)
    assert cause.rank == 1
    assert "ValueError: x at model.py:7 in forward" in str(cause)


def test_a_killed_rank_comes_before_one_that_lost_it():
    cause = find_cause(
        [rank_exit(0, at=1.0, error=LOST_PEER), rank_exit(3, at=1.2, code=-signal.SIGKILL), rank_exit(4, code=0)]
    )
    assert (cause.rank, cause.what) == (3, "on n1 was killed by SIGKILL")


def test_of_several_causes_the_first_counts():
    assert (
        find_cause([rank_exit(0, at=5.0, error="KeyError: 'a'"), rank_exit(1, at=4.0, error="KeyError: 'b'")]).rank == 1
    )


def test_where_all_lost_their_peers_the_network_is_named():
    assert "look at the network" in str(find_cause([rank_exit(0, error=LOST_PEER), rank_exit(1, error=TIMED_OUT)]))


def test_the_kernels_memory_kill_is_told_from_any_other():
    cause = find_cause([rank_exit(1, code=-signal.SIGKILL, oom_kills=1)])
    assert "killed by the kernel for memory (it held 3.0 GiB)" in str(cause)
    assert "train.micro_batch_size" in cause.remedy


def test_a_full_disk_a_full_shm_and_a_full_gpu_have_their_remedies():
    full = "OSError: [Errno 28] No space left on device: '/x/rank-00000.safetensors'"
    assert "found a disk full" in str(find_cause([rank_exit(0, error=full, number=errno.ENOSPC)]))
    assert "checkpoint.keep" in str(find_cause([rank_exit(0, error=full, number=errno.ENOSPC)]))
    shm = find_cause([rank_exit(0, error=full, number=errno.ENOSPC, shm_free_bytes=0)])
    assert "/dev/shm full" in str(shm)
    assert "--shm-size" in shm.remedy
    assert "--shm-size" in find_cause([rank_exit(0, code=-signal.SIGBUS, shm_free_bytes=0)]).remedy
    gpu = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert "data.max_length" in find_cause([rank_exit(0, error=gpu)]).remedy


def test_a_crash_in_compiled_code_shows_its_words_and_the_python_line():
    log = (
        "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n"
        "  what():  8 vs 4. Is there a distributed collective mismatch in your code?\n"
        "Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n"
        '  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 9 in all_reduce\n'
        '  File "/x/trainers/loop.py", line 44 in _settle\n'
    )
    cause = find_cause([rank_exit(0, code=-signal.SIGABRT, log_tail=log)])
    assert "SIGABRT at /x/trainers/loop.py:44 in _settle: 8 vs 4." in str(cause)
    assert "left out a collective" in cause.remedy


def test_an_exit_without_a_word_shows_the_last_line_of_the_log():
    assert "exit code 9: so long" in str(find_cause([rank_exit(0, code=9, log_tail="hello\nso long\n\n")]))
