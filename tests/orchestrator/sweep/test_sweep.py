"""A sweep as a user runs it: halved, killed, run again. Two trials of two workers on two cores."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.sweep.record import SweepRecord, read_sweep
from tests.forked import Command, start_command
from tests.tiny import film_rows, make_bert, tiny_job
from tests.whole_run import environment
from trainers.checkpoint.reading import committed_steps
from trainers.run.events import read_events
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
GRID = ("--set-grid", "train.learning_rate=1e-6,3e-3", "--halving", "2")


def start(job_file: Path, *more: str) -> Command:
    words = ["sweep", str(job_file), *GRID, *more]
    return start_command(words, job_file.parent, environment=environment())


def call(job_file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return start(job_file, *more).finish()


def wait_for(started: Command, storage: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 400
    while len(list(storage.glob(pattern))) < count:
        assert started.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    job = tiny_job(
        folder,
        make_bert(folder / "model", tiny_tokenizer, dropout=0.0),
        "classify",
        [row for row in film_rows(240) if "not" not in row["text"]],
        train={"steps": 16, "global_batch_size": 16, "verify": False},
        scale={"workers": 2},
        checkpoint={"every_steps": 4},
    )
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def storage(job_file: Path) -> Path:
    """The storage of a sweep whose command was killed in its first trial, stopped in its second, and run again."""
    storage = job_file.parent / "storage"
    first = start(job_file)
    wait_for(first, storage, "runs/*", 1)
    (run,) = storage.glob("runs/*")
    stays = {"kind": "wait", "rank": 0, "step": 6, "file": "/nowhere", "committed": 4}
    (run / "faults.json").write_text(json.dumps([stays]))  # the ranks, which start later, stay before the pause
    wait_for(first, storage, "runs/*/checkpoints/step-*/COMMITTED", 1)
    first.process.kill()
    first.finish()
    (run / "faults.json").unlink()
    second = start(job_file)
    wait_for(second, storage, "runs/*/logs/rank-00000.log", 2)
    second.process.terminate()
    assert second.finish().returncode == 75
    done = call(job_file)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage


def record_of(storage: Path) -> SweepRecord:
    (folder,) = (storage / "sweeps").iterdir()
    record = read_sweep(Folder(str(folder)))
    assert record is not None
    return record


def starts(storage: Path, run: str) -> list[int]:
    return [event.step for event in read_events(Folder(str(storage / "runs" / run))) if event.kind == "start"]


def test_the_better_trial_alone_goes_on_after_the_pause(storage: Path) -> None:
    low, high = record_of(storage).trials
    assert (low.state, low.step, low.pauses) == ("paused", 8, (8,))
    assert (high.state, high.step, high.steps) == ("trained", 16, 16)
    assert [step for step, _ in low.curve] == [4, 8]
    stopped = {step for step in starts(storage, high.run) if step}  # where its first steps were under way already
    assert [step for step, _ in high.curve] == sorted({4, 8, 12, 16} | stopped)


def test_killed_and_stopped_it_goes_on_from_committed_steps(storage: Path) -> None:
    low, high = record_of(storage).trials
    assert starts(storage, low.run) == [0, 4]
    assert starts(storage, high.run)[-1] == 8, "the leg after the pause"
    for trial in (low, high):
        steps = [event.step for event in read_events(Folder(str(storage / "runs" / trial.run))) if event.kind == "step"]
        assert set(steps) == set(range(1, trial.step + 1))


def test_the_best_is_registered_and_the_other_cleaned(storage: Path) -> None:
    record = record_of(storage)
    low, high = record.trials
    assert record.best == high.number and record.registry is not None
    assert (record.registry.version, record.registry.alias) == (1, "champion")
    best = high.best("max")
    assert best is not None and record.registry.step == best[0]
    result = json.loads((storage / "runs" / high.run / "result.json").read_text())
    assert result["registry"]["source"] == record.registry.source and Path(record.registry.source).is_dir()
    assert best[0] in committed_steps(Folder(str(storage / "runs" / high.run / "checkpoints")))
    assert not committed_steps(Folder(str(storage / "runs" / low.run / "checkpoints")))


def test_the_page_stands_alone_and_shows_every_trial(storage: Path) -> None:
    (folder,) = (storage / "sweeps").iterdir()
    page = (folder / "report.html").read_text()
    assert "<svg role" in page and "src=" not in page and "<script" not in page
    for trial in record_of(storage).trials:
        assert f"train.learning_rate={trial.values['train.learning_rate']}" in page and trial.run in page
    assert {path.name for path in folder.iterdir()} == {"report.html", "sweep.json", "driver.lock"}


def test_the_same_command_again_does_nothing_twice(storage: Path, job_file: Path) -> None:
    def state() -> dict[Path, Any]:
        return {path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file()}

    before = state()
    again = call(job_file, "--json")
    assert again.returncode == 0 and "already done" in again.stderr
    assert SweepRecord.model_validate_json(again.stdout) == record_of(storage)
    assert state() == before


def test_killed_after_it_registered_the_same_command_cleans_and_writes_the_page(storage: Path, job_file: Path) -> None:
    before = record_of(storage)
    (folder,) = (storage / "sweeps").iterdir()
    (folder / "report.html").unlink()
    left = storage / "runs" / before.trials[0].run / "checkpoints"
    (left / "step-00000008").mkdir(parents=True, exist_ok=True)
    again = call(job_file)
    assert again.returncode == 0, again.stderr
    assert (folder / "report.html").exists() and not left.exists()
    assert record_of(storage) == before
