"""A trial that there is no room for waits, says so once, and heeds the wish to stop."""

import threading
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.run_session import RunSession
from orchestrator.sweep import leg as legs
from orchestrator.sweep.leg import STOP, Leg, train_where_there_is_room
from orchestrator.terminal.progress import Screen
from tests.tiny import checked, film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import Preempted
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

    with pytest.raises(Preempted, match="before there was room"):
        train_where_there_is_room(session, Leg(sweep=sweep, job=job, until=None), say)
    assert len(said) == 1 and "64 workers of 1 CPUs" in said[0], "once, though it looked several times"
