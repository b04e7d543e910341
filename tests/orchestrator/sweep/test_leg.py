"""A trial that there is no room for waits, says so once, and heeds the wish to stop; one process runs many legs."""

import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune
from rich.console import Console

from orchestrator import run_session
from orchestrator.run_session import RunSession
from orchestrator.sweep import leg as legs
from orchestrator.sweep import tuner
from orchestrator.sweep.leg import STOP, Leg, LegEnd, run_leg, train_where_there_is_room
from orchestrator.terminal.progress import Screen
from orchestrator.training.kept_agents import KeptAgents
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import JobError, Preempted, TrainingError
from trainers.run.lock import own_folder
from trainers.run.record import find_run
from trainers.storage import Folder


@pytest.mark.cluster
def test_a_trial_without_room_waits_and_stops_on_request(
    tmp_path: Path, tiny_tokenizer: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legs, "ROOM_PAUSE_S", 1.0)
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", film_rows(80), train={"global_batch_size": 64}, scale={"workers": 64})
    shard_locally(job)
    session = RunSession(checked(job), Screen(Console(quiet=True)))
    session.run = find_run(job)
    sweep, said = Folder(str(tmp_path / "sweep")), []

    def say(line: str) -> None:
        said.append(line)
        threading.Timer(4.0, sweep.write_bytes, (STOP, b"")).start()

    with pytest.raises(Preempted, match="while it waited"):
        train_where_there_is_room(session, Leg(sweep=sweep, job=job, until=None), say)
    assert len(said) == 1 and "64 workers of 1 CPUs" in said[0], "once, though it looked several times"


def test_the_node_agents_of_a_leg_are_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(legs, "train", lambda session, stop, kept, anew: given.append(kept))
    for _ in range(2):
        train_where_there_is_room(None, Leg.model_construct(sweep=None), given.append)
    assert isinstance(given[0], KeptAgents) and given[0] is given[1]


class Three:
    """A desk with three legs, one at a time."""

    def __init__(self) -> None:
        self.given = 0
        self.said: list[tuple[int, str]] = []
        self.taken: list[tuple[int, Any]] = []

    def next_leg(self) -> tuple[int, Leg] | None:
        self.given += 1
        return (self.given, Leg.model_construct()) if self.given <= 3 else None

    def take(self, number: int, end: LegEnd | None) -> None:
        self.taken.append((number, end))

    def say(self, number: int, line: str) -> None:
        self.said.append((number, line))

    def wants_stop(self) -> bool:
        return False


@pytest.mark.cluster
def test_a_leg_finds_the_process_of_the_one_before(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has imported is there: starting a process anew took 4 s of CPU for each."""

    def leg(config: dict[str, Any]) -> None:
        tune.report({"line": str(os.getpid()), "end": None})
        tune.report({"line": None, "end": LegEnd(step=config["number"]).model_dump_json()})

    monkeypatch.setattr(tuner, "_leg", leg)
    desk = Three()
    tuner.run_legs(desk, Folder(str(tmp_path)), at_once=1)
    assert [(number, end.step) for number, end in desk.taken] == [(1, 1), (2, 2), (3, 3)]
    assert [number for number, _ in desk.said] == [1, 2, 3] and len({line for _, line in desk.said}) == 1


@pytest.fixture
def leg(tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Leg:
    monkeypatch.setattr(legs, "ROOM_PAUSE_S", 0.0)
    monkeypatch.setattr(legs, "LOCK_WAIT_S", 0.0)
    monkeypatch.setattr(run_session, "plan_here", lambda checked: SimpleNamespace(model_dump_json=lambda **_: "{}"))
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(40))
    shard_locally(job)
    return Leg(sweep=Folder(str(tmp_path / "sweep")), job=job, until=None)


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "error", "passing"),
    [
        ("train", OSError(errno.ESTALE, "Stale file handle"), True),
        ("check_job", OSError(errno.ESTALE, "Stale file handle"), True),
        ("write_shards", ray.exceptions.NodeDiedError("the node is gone"), True),
        ("check_job", JobError("model.path: no such folder"), False),
        ("train", TrainingError("3 failures in a row; the last: CUDA out of memory"), False),
    ],
)
def test_a_leg_tells_its_error_and_whether_it_may_pass(
    leg: Leg, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, passing: bool
) -> None:
    monkeypatch.setattr(legs, where, failing(error))
    end = run_leg(leg, print)
    assert (end.may_pass, end.stopped) == (passing, False) and end.error is not None
    assert end.error.startswith(type(error).__name__) and str(error).split("]")[-1].strip() in end.error


def test_a_run_that_another_command_has_is_waited_for(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(legs, "train", lambda *_, **__: None)
    monkeypatch.setattr(legs, "LET_GO_S", 0.1)
    with ExitStack() as other:
        other.enter_context(own_folder(find_run(leg.job).folder))
        threading.Timer(1.0, other.close).start()
        end = run_leg(leg, said.append)
    assert (end.error, end.stopped) == (None, False)
    assert len(said) == 1 and "another process is at work" in said[0], "once, though it tried several times"


def test_a_leg_that_waits_for_another_command_heeds_the_wish_to_stop(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legs, "ROOM_PAUSE_S", 5.0)
    leg.sweep.write_bytes(STOP, b"")
    with own_folder(find_run(leg.job).folder):
        assert run_leg(leg, print) == LegEnd(stopped=True)
