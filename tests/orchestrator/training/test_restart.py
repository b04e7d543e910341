"""When the ranks are started again, when that would be in vain, and how long to wait before."""

import errno
import io
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training.failure_cause import lasting_error
from orchestrator.training.restart import LONGEST_PAUSE_S, Failure, pause_s, why_end
from tests.orchestrator.training.test_failure_cause import rank_exit
from trainers.errors import JobError, TrainingError, may_pass
from trainers.run.events import FailedEvent, RefusedEvent, parse_events
from trainers.worker import rank_server

SAME = Failure("rank 1 raised KeyError: 'a'", error="KeyError: 'a' at model.py:7")
PASSING = Failure("rank 1 raised OSError: stale handle")


def test_restarts_are_used_up():
    assert why_end(PASSING, PASSING, 3, allowed=3) is None
    assert "4 times in a row" in why_end(PASSING, PASSING, 4, allowed=3)


def test_what_is_sure_to_come_again_is_not_tried_a_third_time():
    assert why_end(SAME, None, 1, allowed=3) is None
    assert "twice in the same way before its first step" in why_end(SAME, SAME, 2, allowed=3)
    other = Failure("rank 0 raised KeyError: 'b'", error="KeyError: 'b' at model.py:7")
    assert why_end(other, SAME, 2, allowed=3) is None
    stepped, further = (Failure(SAME.cause, error=SAME.error, step=step) for step in (7, 8))
    assert why_end(stepped, SAME, 2, allowed=3) is None, "it got further"
    assert why_end(further, stepped, 2, allowed=3) is None, "and further"
    assert "twice in the same way after step 7" in str(why_end(stepped, stepped, 2, allowed=3))


def test_storage_and_memory_get_time_and_a_failed_step_none():
    assert [pause_s(PASSING, failures) for failures in (1, 2, 3, 9)] == [1.0, 2.0, 4.0, LONGEST_PAUSE_S]
    assert pause_s(Failure("killed", step=3), 3) == 0.0


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (caused(JobError("no tokenizer can be loaded"), OSError(errno.EIO, "x")), True),
        (MemoryError("the node is short of 3 GiB"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"), True),
        (Exception("Input/output error (os error 5)"), True),
        (Exception("No such file or directory (os error 2)"), False),
        (caused(JobError("teacher cannot be loaded"), OSError("x is not a valid model identifier")), False),
        (caused(JobError("teacher cannot be loaded"), FileNotFoundError(errno.ENOENT, "x")), False),
        (OSError("in bucket 'yard': AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation: no text"), True),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: no text"), False),
        (Exception("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"), True),
        (TrainingError("written by another job"), False),
        (ValueError("shapes differ"), False),
    ],
)
def test_only_what_cannot_change_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, passing: bool
) -> None:
    def fail(*_: Any) -> None:
        raise error

    events = io.StringIO()
    monkeypatch.setattr(rank_server, "run_rank", fail)
    hooks = rank_server.PipeHooks(events, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    code = rank_server._run(SimpleNamespace(), hooks)  # type: ignore[arg-type]
    (event,) = parse_events(events.getvalue().encode().splitlines())
    assert may_pass(error) == passing
    if isinstance(error, JobError | TrainingError) and not passing:
        assert isinstance(event, RefusedEvent) and code == error.exit_code
    else:
        assert isinstance(event, FailedEvent) and event.may_pass == passing and code == rank_server.FAILED


def test_a_lost_peer_is_no_lasting_error():
    assert lasting_error([rank_exit(0, error="RuntimeError: Connection reset by peer")]) is None
    assert lasting_error([rank_exit(0, code=-9)]) is None
    both = [rank_exit(0, error="RuntimeError: Connection closed"), rank_exit(1, error="KeyError: 'a'")]
    assert lasting_error(both) == "KeyError: 'a' at model.py:7 in forward"


def test_an_error_is_the_same_whatever_numbers_it_names():
    first, second, other = (
        lasting_error([rank_exit(0, error=f"ValueError: {text}")])
        for text in ("<T object at 0x7f12ab> took 3.2 s", "<T object at 0x7f98cd> took 4 s", "<U object at 0x7f12ab>")
    )
    assert first == second != other
