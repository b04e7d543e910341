"""What becomes of a trial when its leg comes back, without training: the record, the checkpoints, the next leg."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from orchestrator.sweep import sweep
from orchestrator.sweep.leg import LegEnd
from orchestrator.sweep.record import SweepRecord, Trial, read_sweep, write_sweep
from orchestrator.sweep.spec import SweepSpec
from orchestrator.sweep.sweep import Sweep
from orchestrator.terminal.progress import Screen
from tests.tiny import film_rows, tiny_job
from trainers.checkpoint.cleaning import finish_removals
from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.run.folder import CLEANED, RegisteredVersion, RunResult
from trainers.storage import Folder


@pytest.fixture
def desk(tmp_path: Path) -> Sweep:
    """Three trials, each with a checkpoint and an export in its run folder."""
    job = tiny_job(tmp_path, tmp_path / "model", "classify", film_rows(10))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    values: list[float] = [1e-5, 1e-4, 1e-3]
    trials = [Trial(number=n, values={"train.learning_rate": rate}, run=f"tiny-{n}", steps=6, pauses=(3,))
              for n, rate in enumerate(values, 1)]  # fmt: skip
    for trial in trials:
        for name in ("checkpoints", "export"):
            (tmp_path / "storage" / "runs" / trial.run / name / "step-00000003").mkdir(parents=True)
    record = SweepRecord(job="tiny", fields=("train.learning_rate",), method="grid", halving=2, metric="accuracy",
                         mode="max", trials=tuple(trials))  # fmt: skip
    spec = SweepSpec(job=str(tmp_path / "job.yaml"), space={"train.learning_rate": tuple(values)}, halving=2)
    folder = Folder(str(tmp_path / "storage" / "sweeps" / "tiny-0"))
    return Sweep(spec, (), folder, record, Screen(Console(quiet=True)), lambda: False)


def with_checkpoints(desk: Sweep) -> list[int]:
    finish_removals()
    runs = desk.folder.parent.parent / "runs"
    held = [trial.number for trial in desk.record.trials if (runs / trial.run / "checkpoints").exists()]
    assert held == [trial.number for trial in desk.record.trials if (runs / trial.run / "export").exists()]
    return held


def end(step: int, value: float) -> LegEnd:
    return LegEnd(step=step, curve=((step, value),), trained=step == 6)


def test_legs_go_to_the_pause_and_on_from_it(desk: Sweep) -> None:
    first = desk.next_leg()
    assert first is not None and first[0] == 1 and first[1].until == 3
    assert first[1].job.train.learning_rate == 1e-5 and first[1].job.evaluate.on == "ranks"
    second = desk.next_leg()
    assert second is not None and second[0] == 2, "the first is under way"
    desk.take(1, end(3, 0.4))
    desk.take(2, end(3, 0.5))
    third = desk.next_leg()
    assert third is not None and third[0] == 3
    desk.take(3, end(3, 0.3))
    best = desk.next_leg()
    assert best is not None and (best[0], best[1].until) == (2, None)
    assert read_sweep(desk.folder) == desk.record


def test_who_has_ended_and_is_not_the_best_is_cleaned_and_a_paused_trial_is_not(desk: Sweep) -> None:
    desk.take(1, end(6, 0.9))
    desk.take(2, end(3, 0.5))
    assert with_checkpoints(desk) == [1, 2, 3]
    desk.take(3, end(6, 0.95))
    assert with_checkpoints(desk) == [2, 3]
    desk.clean(best=3, everything=True)
    assert with_checkpoints(desk) == [3]


def test_a_run_that_was_registered_before_keeps_what_it_has(desk: Sweep) -> None:
    version = RegisteredVersion(model="tiny", version=1, alias=None, step=3, source="", decision="")
    result = RunResult(status="done", registry=version)
    (desk.folder.parent.parent / "runs" / "tiny-1").write_bytes("result.json", result.model_dump_json().encode())
    desk.take(2, end(6, 0.9))
    desk.take(1, end(6, 0.1))
    assert with_checkpoints(desk) == [1, 2, 3]


def test_a_process_that_dies_is_started_again_and_at_the_third_time_its_trial_has_failed(desk: Sweep) -> None:
    for _ in range(2):
        leg = desk.next_leg()
        assert leg is not None and leg[0] == 1
        desk.take(1, None)
    assert desk.trial(1).state == "waiting"
    assert desk.next_leg() is not None
    desk.take(1, None)
    assert desk.trial(1).state == "failed" and "died 3 times" in str(desk.trial(1).error)
    following = desk.next_leg()
    assert following is not None and following[0] == 2


def test_a_leg_that_was_stopped_is_given_out_again(desk: Sweep) -> None:
    for _ in range(2):
        leg = desk.next_leg()
        assert leg is not None and leg[0] == 1
        desk.take(1, LegEnd(step=2, stopped=True))
    assert desk.trial(1).step == 0


def test_a_failure_is_told_and_ranks_last(desk: Sweep) -> None:
    desk.take(1, LegEnd(step=1, error="TrainingError: the loss diverged"))
    desk.take(2, end(3, 0.0))
    assert desk.trial(1).state == "failed"
    assert [trial.number for trial in desk.record.ranked()] == [2, 1, 3]


def test_what_may_pass_is_tried_again_and_at_the_third_time_its_trial_has_failed(desk: Sweep) -> None:
    desk.take(1, end(3, 0.4))
    for _ in range(2):
        desk.take(1, LegEnd(step=4, error="OSError: Stale file handle", may_pass=True))
        assert (desk.trial(1).state, desk.trial(1).error) == ("paused", None)
    desk.take(1, LegEnd(error="OSError: Stale file handle", may_pass=True))
    assert (desk.trial(1).state, desk.trial(1).error) == ("failed", "OSError: Stale file handle")
    assert desk.trial(1).curve == ((3, 0.4),), "the last one could not read how far it came"


def test_what_keeps_a_trial_from_beginning_is_tried_again_too(desk: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [OSError(errno.ESTALE, "Stale file handle"), DataError("no rows")]

    def check(job: Job) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(sweep, "check_job", check)
    monkeypatch.setattr(sweep, "ROOM_PAUSE_S", 0.0)
    desk.record = desk.record.updated(desk.trial(1).model_copy(update={"run": ""}))
    following = desk.next_leg()
    assert following is not None and following[0] == 2
    assert (desk.trial(1).state, desk.trial(1).error) == ("failed", "DataError: no rows")


def test_a_run_that_is_cleaned_says_so_and_can_still_be_compared(desk: Sweep) -> None:
    runs = desk.folder.parent.parent / "runs"
    (runs / "tiny-1").write_json("evals/step-00000003.json", {})
    desk.clean(best=3, everything=True)
    assert with_checkpoints(desk) == [3]
    assert (runs / "tiny-1").exists("evals/step-00000003.json")
    assert 0 < (runs / "tiny-1").read_json(CLEANED)["time"] <= time.time()
    assert not (runs / "tiny-3").exists(CLEANED)


def test_a_record_that_another_command_wrote_while_this_one_started_is_not_undone(
    desk: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command ends, and lets go of the sweep, while the second starts Ray."""
    version = RegisteredVersion(model="tiny", version=1, alias=None, step=6, source="", decision="")
    write_sweep(desk.folder, desk.record)

    @contextmanager
    def slow_ray(address: str | None) -> Iterator[None]:
        write_sweep(desk.folder, desk.record.model_copy(update={"best": 2, "registry": version}))
        desk.folder.write_bytes("report.html", b"")
        yield

    monkeypatch.setattr(sweep, "check_trials", lambda *_: (None, []))
    monkeypatch.setattr(sweep, "sweep_folder", lambda *_: desk.folder)
    monkeypatch.setattr(sweep, "ray_session", slow_ray)
    _, record = sweep.run_sweep(desk.spec, (), None, desk.screen)
    assert record == read_sweep(desk.folder) and record.registry == version
