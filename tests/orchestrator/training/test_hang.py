"""When ranks count as hung, and who is blamed for it."""

from types import SimpleNamespace
from typing import Any

from orchestrator.training.controller import Controller, _hangs
from orchestrator.training.hang import LEAST_S, LOAD_S, blame, is_hung, stand
from orchestrator.training.node_report import NodeReport
from trainers.checkpoint.checkpointer import LAST_S
from trainers.training import loop
from trainers.training.straggler import SETTLING
from trainers.worker.heartbeat import Heartbeat

IN_STEP = 'Thread 0x1 (most recent call first):\n  File "/x/trainers/batches.py", line 5 in _collate\n'
IN_COLLECTIVE = (
    "Thread 0x2 (most recent call first):\n"
    '  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'
    '  File "/x/trainers/loop.py", line {line} in _settle\n'
)


def waiting(rank, step=4, phase="settle", line=9):
    return stand(rank, Heartbeat(step, phase, 99.0), "S", IN_COLLECTIVE.format(line=line))


def test_ranks_hang_when_none_of_them_moves():
    still, moving = Heartbeat(5, "step", 100.0), Heartbeat(5, "step", 1.0)
    assert is_hung({0: still, 1: still}, 30.0, [])
    assert not is_hung({0: still, 1: moving}, 30.0, [])
    assert not is_hung({}, 30.0, [])


def test_no_hang_is_seen_until_every_node_has_answered():
    """Rank 0 evaluates, rank 1 waits for it: without rank 0's word all that are known stand still."""
    group: Any = SimpleNamespace(size=2)
    run: Any = SimpleNamespace(job=SimpleNamespace(scale=SimpleNamespace(hang_after_s="auto")))
    unused: Any = None
    controller = Controller(run, unused, unused, unused, bool, group, step_times=[1.0] * 9)
    evaluating, waiting = {0: Heartbeat(99, "evaluate", 90.0)}, {1: Heartbeat(100, "data", 70.0)}
    assert not _hangs(controller, NodeReport(waiting))
    assert not _hangs(controller, NodeReport(evaluating | waiting))
    still, ended = {0: Heartbeat(99, "step", 70.0)}, SimpleNamespace(rank=0)
    assert not _hangs(controller, NodeReport(still | waiting)), "it was looked at just now"
    controller.judged = 0.0
    assert _hangs(controller, NodeReport(still | waiting))
    controller.judged = 0.0
    assert _hangs(controller, NodeReport(waiting, exits=[ended]))


def test_the_automatic_threshold_follows_the_steps_and_leaves_loading_its_time():
    def hung(age, phase, times):
        return is_hung({0: Heartbeat(5, phase, age)}, "auto", times)

    assert not hung(LEAST_S - 1, "step", [0.1] * 9)
    assert hung(LEAST_S + 1, "step", [0.1] * 9)
    assert not hung(10 * 30.0, "step", [30.0] * 9)  # a step ten times slower than usual
    assert hung(21 * 30.0, "step", [30.0] * 9)
    for phase in ("start", "load", "save", "evaluate"):
        assert not hung(LOAD_S - 1, phase, [0.1] * 9)
        assert hung(LOAD_S + 1, phase, [0.1] * 9)
    assert not hung(2 * LAST_S, "commit", [0.1] * 9), "a rank waits that long for its last two saves"
    assert hung(2 * LAST_S + LOAD_S + 1, "commit", [0.1] * 9)


def test_a_stopped_process_is_to_blame_wherever_it_stands():
    stopped = stand(1, Heartbeat(4, "step", 99.0), "T", IN_COLLECTIVE.format(line=1))
    report = blame([waiting(0), stopped])
    assert report.culprit.rank == 1
    assert "its process is stopped" in str(report)


def test_the_rank_that_is_not_in_a_collective_is_to_blame():
    report = blame([waiting(0), waiting(2), stand(1, Heartbeat(4, "data", 99.0), "S", IN_STEP)])
    assert report.culprit.rank == 1
    assert "rank 1: step 5, phase data, at /x/trainers/batches.py:5 in _collate" in str(report)
    assert "Others: rank 0: step 5, phase settle" in str(report)


def test_on_gpus_ranks_wait_for_others_where_they_ask_for_the_numbers_of_the_step():
    """A collective returns at once there: nothing of torch.distributed is on the stack."""

    def settling(rank):
        stack = '  File "/x/trainers/training/loop.py", line 257 in _settle\n'
        return stand(rank, Heartbeat(4, "settle", 99.0), "S", f"Thread 0x1 (most recent call first):\n{stack}")

    report = blame([settling(0), settling(1), stand(2, Heartbeat(4, "data", 99.0), "S", IN_STEP)])
    assert report.culprit.rank == 2 and settling(0).waits
    assert loop.__file__.endswith(SETTLING[0]) and hasattr(loop, SETTLING[1])


def test_where_all_wait_the_odd_one_left_a_collective_out():
    assert blame([waiting(0), waiting(1), waiting(2, line=30)]).culprit.rank == 2
    assert blame([waiting(0, phase="step"), waiting(1, phase="settle")]).culprit.rank == 1  # it ran ahead


def test_a_rank_that_cannot_answer_is_to_blame():
    assert blame([waiting(0), stand(1, Heartbeat(4, "step", 99.0), "D", "")]).culprit.rank == 1
