"""Population-based training as a user runs it: two members, two generations, killed after the decision."""

import time
from pathlib import Path

import pytest
import yaml

from orchestrator.sweep.record import SweepRecord, read_sweep
from tests.forked import Command, start_command
from tests.tiny import film_rows, make_bert, tiny_job
from tests.whole_run import environment
from trainers.checkpoint.reading import committed_steps
from trainers.run.continued import read_line
from trainers.run.events import Event, read_events
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
END, STEPS = 6, 12


def start(file: Path) -> Command:
    return start_command(["sweep", str(file)], file.parent, environment=environment())


def record_of(storage: Path) -> SweepRecord | None:
    folder = next((storage / "sweeps").glob("*"), None)
    return read_sweep(Folder(str(folder))) if folder else None


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> tuple[Path, SweepRecord, str]:
    """The storage of a population whose command was killed once its decision was recorded, and run again; the record as
    the kill left it; what the second command printed."""
    folder = tmp_path_factory.mktemp("population")
    job = tiny_job(
        folder,
        make_bert(folder / "model", tiny_tokenizer, dropout=0.0),
        "classify",
        [row for row in film_rows(120) if "not" not in row["text"]],
        train={"steps": STEPS, "global_batch_size": 8, "verify": False, "schedule": "linear"},
        checkpoint={"every_steps": 3, "keep": 1},
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    space = {"train.learning_rate": {"low": 1e-6, "high": 3e-3, "log": True}}
    file, storage = folder / "sweep.yaml", folder / "storage"
    spec = {"job": "job.yaml", "method": "population", "trials": 2, "generations": 2, "space": space}
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    first, deadline = start(file), time.monotonic() + 400
    while not ((record := record_of(storage)) and record.generations):
        assert first.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    first.process.kill()
    first.finish()
    second = start(file).finish()
    said = second.stdout + second.stderr
    assert second.returncode == 0, said
    return storage, record, said


def events(storage: Path, run: str) -> list[Event]:
    return read_events(Folder(str(storage / "runs" / run)))


def test_the_same_command_goes_on_with_the_same_decision(sweep: tuple[Path, SweepRecord, str]) -> None:
    storage, before, _ = sweep
    after = record_of(storage)
    assert after is not None and after.copies == before.copies and len(after.copies) == 1
    (copy,) = after.copies
    at_end = {trial.number: dict(trial.curve).get(END) for trial in before.trials if trial.number != copy.trial}
    assert at_end[copy.parent] == max(value for value in at_end.values() if value is not None)
    assert after.generations == 1 and {trial.state for trial in after.trials} == {"trained"}


def test_the_copy_goes_on_from_its_parents_checkpoint_with_its_own_values(sweep: tuple[Path, SweepRecord, str]) -> None:
    storage, _, _ = sweep
    record = record_of(storage)
    assert record is not None
    (copy,) = record.copies
    trial, parent = (next(one for one in record.trials if one.number == n) for n in (copy.trial, copy.parent))
    (stretch,) = trial.line
    assert (stretch.trial, stretch.run, stretch.step) == (parent.number, parent.run, END)
    assert trial.values == copy.values != parent.values == stretch.values
    (ancestor,) = read_line(Folder(str(storage / "runs" / trial.run)))
    rates = parent.values["train.learning_rate"], trial.values["train.learning_rate"]
    assert (ancestor.run, ancestor.step, ancestor.digest) == (parent.run, END, stretch.digest)
    assert ancestor.changed == {"train.learning_rate": rates}
    own = events(storage, trial.run)
    assert {event.step for event in own if event.kind == "start"} <= {END, 9} and own
    steps = {event.step: event.learning_rate for event in own if event.kind == "step"}
    expected = {step: rates[step > END] * (STEPS - step + 1) / STEPS for step in range(1, STEPS + 1)}
    assert steps == pytest.approx(expected), "its parent's steps as they were, then its own"
    assert dict(trial.curve)[END] == dict(parent.curve)[END], "one checkpoint, measured in both runs"


def test_the_best_alone_keeps_checkpoints_and_is_registered(sweep: tuple[Path, SweepRecord, str]) -> None:
    storage, _, _ = sweep
    record = record_of(storage)
    assert record is not None and record.registry is not None and record.registry.version == 1
    best = next(trial for trial in record.trials if trial.number == record.best)
    assert best == record.ranked()[0]
    for run in (storage / "runs").glob("tiny-*"):
        assert bool(committed_steps(Folder(str(run / "checkpoints")))) == (run.name == best.run), run
    assert {copy.left for copy in record.copies} <= {run.name for run in (storage / "runs").iterdir()}


def test_table_and_page_say_who_came_from_whom(sweep: tuple[Path, SweepRecord, str]) -> None:
    storage, _, said = sweep
    record = record_of(storage)
    assert record is not None
    (copy,) = record.copies
    assert f"{copy.parent} at {END}" in said and "values by step" in said
    page = next((storage / "sweeps").glob("*/report.html")).read_text()
    left = next(trial for trial in record.trials if trial.number == copy.trial).line[0]
    assert "Values by step" in page and left.run in page and f"1 to {END}" in page
