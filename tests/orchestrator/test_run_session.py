"""How a block that holds a run may end, and what result.json says of it: SIGTERM, Ctrl-C, errors of no known cause."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from orchestrator import run_session
from orchestrator.run_session import RunSession, _stopped_by_sigterm
from orchestrator.terminal.progress import Screen
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import Preempted
from trainers.run.folder import read_result
from trainers.run.record import Run, find_run


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(run_session, "plan_here", lambda checked: SimpleNamespace(model_dump_json=lambda **_: "{}"))
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(40))
    shard_locally(job)
    return find_run(job)


def session_of(run: Run, *told_to_go: Any) -> RunSession:
    return RunSession(checked(run.job), Screen(Console(quiet=True)), *told_to_go)


def ended(run: Run) -> tuple[str, str | None]:
    result = read_result(run.folder)
    assert result is not None
    return result.status, result.error


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.cluster
@pytest.mark.parametrize("wait", ["get", "wait"])
def test_sigterm_ends_a_wait_in_ray_at_once_and_the_run_is_preempted(run: Run, ray_session: None, wait: str) -> None:
    import ray

    nap = ray.remote(num_cpus=0)(lambda seconds: time.sleep(seconds))
    ray.get(nap.remote(0))
    began = time.monotonic()
    with pytest.raises(Preempted, match="SIGTERM") as caught, _stopped_by_sigterm() as told:
        session = session_of(run, told)
        with session.hold(run):
            threading.Timer(1.0, send_sigterm).start()
            ray.get(nap.remote(15)) if wait == "get" else ray.wait([nap.remote(15)])
    assert caught.value.exit_code == 75 and ended(run) == ("preempted", str(caught.value))
    assert time.monotonic() - began < 10


def test_a_second_sigterm_does_not_cut_off_the_record_of_the_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = RunSession._summary
    monkeypatch.setattr(RunSession, "_summary", lambda *given: (send_sigterm(), summary(*given))[1])
    with pytest.raises(Preempted), _stopped_by_sigterm() as told, session_of(run, told).hold(run):
        send_sigterm()
    assert ended(run)[0] == "preempted"


def test_ctrl_c_stays_ctrl_c(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt), _stopped_by_sigterm() as told, session_of(run, told).hold(run):
        signal.raise_signal(signal.SIGINT)
    assert read_result(run.folder) is None


def test_an_error_of_no_known_cause_stands_in_the_result(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), session_of(run).hold(run):
        raise ZeroDivisionError("of all things")
    assert ended(run) == ("failed", "ZeroDivisionError: of all things")


def test_storage_that_stays_away_hides_no_cause(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainers.patience.RETRY_S", 0.1)
    session, said = session_of(run), []
    monkeypatch.setattr(session.screen, "say", said.append)
    with pytest.raises(Preempted), session.hold(run):
        monkeypatch.setattr(session.log, "_write", full)
        session.note_stage("train", 1.0)
        raise Preempted("stopped")
    assert len(said) == 2 and "tried again" in said[0]
    assert "result.json could not be written, and 1 lines of its log are lost: OSError" in said[1]
