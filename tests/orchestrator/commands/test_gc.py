"""`tuneyard gc` on a copy of a real run's storage: what it takes, and above all what it leaves."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.gc import delete, find_garbage
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError
from trainers.run.lock import own_folder
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

HOUR_S = 3600.0


@pytest.fixture
def storage(finished: Path, tmp_path: Path) -> Path:
    """A storage of its own with the finished run alone, all of it a day old."""
    source, target = finished.parents[1], tmp_path / "storage"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("runs", "*.db"))
    shutil.copytree(finished, target / "runs" / finished.name)
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["storage"] = str(target)
    (target / "runs" / finished.name / "job.yaml").write_text(yaml.safe_dump(job))
    with sqlite3.connect(source / "mlflow.db") as there, sqlite3.connect(target / "mlflow.db") as database:
        there.backup(database)
        database.execute("UPDATE model_versions SET source = replace(source, ?, ?)", (str(source), str(target)))
    used = json.loads((finished / "shards.json").read_text())
    for other in (target / "shards").iterdir():
        if other.name not in used:
            shutil.rmtree(other)
    age(target)
    return target


def age(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1.0, 1.0))


def run_of(storage: Path) -> Path:
    (run,) = (path for path in (storage / "runs").iterdir() if path.is_dir())
    return run


def found(storage: Path, checkpoints: bool = False) -> set[str]:
    garbage = find_garbage(str(storage), HOUR_S, checkpoints).garbage
    return {str(Path(one.path).relative_to(storage)) for one in garbage}


def clutter(storage: Path) -> set[str]:
    """What nobody needs: shards of a job that was never run, an export, a leftover."""
    run = run_of(storage)
    used = json.loads((run / "shards.json").read_text())
    export = next((run / "export").iterdir())
    shutil.copytree(storage / "shards" / used[0], storage / "shards" / "0123456789abcdef")
    shutil.copytree(export, run / "export" / "step-00000001")
    (storage / "shards" / ".tmp-1234-x").write_text("half a file")
    age(storage)
    return {"shards/0123456789abcdef", f"runs/{run.name}/export/step-00000001", "shards/.tmp-1234-x"}


def test_nothing_of_a_run_is_garbage(storage: Path) -> None:
    assert find_garbage(str(storage), 0.0, checkpoints=False).model_dump() == {"garbage": (), "kept": ()}


def test_it_lists_and_deletes_what_nobody_needs_and_nothing_else(storage: Path) -> None:
    expected = clutter(storage)
    before = {path for path in storage.rglob("*") if path.is_file()}
    words = ["gc", "--storage", str(storage), "--older-than-days", "1"]
    listed = CliRunner().invoke(app, [*words, "--json"])
    assert {str(Path(one["path"]).relative_to(storage)) for one in json.loads(listed.stdout)["garbage"]} == expected
    assert before == {path for path in storage.rglob("*") if path.is_file()}
    said = CliRunner().invoke(app, [*words, "--yes"]).stdout
    assert all(path in said for path in expected) and "deleted" in said
    left = {path for path in storage.rglob("*") if path.is_file()}
    assert before - left == {path for path in before if any(path.is_relative_to(storage / one) for one in expected)}
    assert CliRunner().invoke(app, words).stdout == "nothing to delete\n"


def test_what_was_used_lately_stays(storage: Path) -> None:
    clutter(storage)
    os.utime(storage / "shards" / "0123456789abcdef" / "manifest.json")
    assert "shards/0123456789abcdef" not in found(storage)


def test_of_the_checkpoints_the_best_the_registered_and_the_newest_stay(storage: Path) -> None:
    run = run_of(storage)
    result = json.loads((run / "result.json").read_text())
    steps = committed_steps(Folder(str(run / "checkpoints")))
    needed = {result["best"]["step"], result["registry"]["step"], steps[-1]}
    gone = {f"runs/{run.name}/checkpoints/step-{step:08d}" for step in steps if step not in needed}
    assert gone and found(storage) == set()
    assert found(storage, checkpoints=True) == gone
    assert delete(find_garbage(str(storage), HOUR_S, True).garbage) == []
    assert set(committed_steps(Folder(str(run / "checkpoints")))) == needed


def test_an_export_that_a_version_names_stays_whatever_the_run_says(storage: Path) -> None:
    run = run_of(storage)
    result = json.loads((run / "result.json").read_text())
    result["best"]["step"] = result["registry"]["step"] = 1
    (run / "result.json").write_text(json.dumps(result))
    age(storage)
    assert found(storage) == set()
    with sqlite3.connect(storage / "mlflow.db") as database:
        database.execute("UPDATE model_versions SET source = '/elsewhere'")
    assert len(found(storage)) == 1


@pytest.mark.parametrize("status", ["failed", "preempted"])
def test_a_run_that_goes_on_is_left_alone(storage: Path, status: str) -> None:
    shards = {path for path in clutter(storage) if not path.startswith("runs")}
    run = run_of(storage)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"status": status}))
    assert found(storage, checkpoints=True) == shards


def test_a_run_that_is_at_work_is_left_alone_also_where_it_began_since(storage: Path) -> None:
    clutter(storage)
    run = run_of(storage)
    garbage = [one for one in find_garbage(str(storage), HOUR_S, True).garbage if one.run]
    with own_folder(Folder(str(run))):
        assert not any(path.startswith("runs") for path in found(storage, checkpoints=True))
        stayed = delete(garbage)
    assert len(stayed) == len(garbage) > 1
    assert all(Path(one.path).exists() for one in garbage)


def test_a_run_that_does_not_say_what_it_used_keeps_all_shards(storage: Path) -> None:
    clutter(storage)
    (run_of(storage) / "shards.json").unlink()
    told = find_garbage(str(storage), HOUR_S, False)
    assert not [one for one in told.garbage if one.kind == "shards"]
    assert "did not note its own" in told.kept[0]


def test_a_bucket_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="gc works on folders"):
        find_garbage("s3://bucket/runs", 0.0, False)
    with pytest.raises(JobError, match="no folder"):
        find_garbage(str(tmp_path / "nothing"), 0.0, False)
