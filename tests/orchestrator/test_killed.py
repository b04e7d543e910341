"""A driver killed or stopped in any stage: the same command finishes, with the losses of an undisturbed run."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bucket import KEY_ID, SECRET, Bucket, serve_bucket
from tests.forked import Command, run_command, start_command
from tests.whole_run import (
    answer,
    coming_run,
    environment,
    events_of,
    find_run,
    losses,
    mlflow_runs,
    own_job,
    put_faults,
    result_of,
    runs_of,
    sets,
    starts,
    storage_of,
    wait_for,
)
from trainers.checkpoint.reading import committed_steps
from trainers.run.events import StageStartEvent, read_events
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
MARK = "TUNEYARD_TEST_PROCESS"
"""An environment variable that marks every process a command starts."""


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with serve_bucket() as served:
        yield served


def start_run(job_file: Path, *words: str, **variables: str) -> Command:
    return start_command(["run", str(job_file), *words], job_file.parent, environment=environment(**variables))


@dataclass(frozen=True)
class Killed:
    """What is known of a command whose driver was killed."""

    mark: str
    """Of the processes that it started."""
    told: str
    ray_logs: Path


def kill_when(reached: Callable[[], bool], job_file: Path, *words: str) -> Killed:
    """Start `tuneyard run`, kill -9 its driver as soon as `reached`, and wait until all it started is gone, but for the
    guard, which watches for stragglers some seconds more."""
    mark = uuid.uuid4().hex
    driver = start_run(job_file, *words, **{MARK: mark})
    wait_for(reached, driver.process.is_alive)
    driver.process.kill()
    told = driver.finish()
    wait_until_gone(lambda: [process for process in marked_processes(mark) if "reaper.py" not in command_of(process)])
    (session,) = Path("/tmp/ray").glob(f"session_*_{driver.process.pid}")
    return Killed(mark, told.stdout + told.stderr, session / "logs")


def marked_processes(mark: str) -> list[int]:
    """Living processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def command_of(process: int) -> str:
    try:
        return f"{process}: " + Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return f"{process}: gone"


def wait_until_gone(living: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + 120
    while left := living():
        assert time.monotonic() < deadline, f"orphans: {[command_of(process) for process in left]}"
        time.sleep(0.2)


def test_a_driver_killed_in_each_stage_is_finished_by_the_same_command(
    finished: Path, job_file: Path, tmp_path: Path, bucket: Bucket
) -> None:
    """Killed while sharding, training, evaluating and registering; ends with the losses of the undisturbed run.

    Data and checkpoints lie in a bucket, the run does not. The keys that stand in both URIs are in no file, log or
    terminal.
    """
    bucket.client.upload_file(str(job_file.parent / "train.jsonl"), "yard", "data/train.jsonl")
    own = own_job(job_file, tmp_path, train=[bucket.uri("data/train.jsonl")])
    words = sets(name="killed", checkpoint__storage=bucket.uri("kept"), evaluate__while_training="false",
                 report_to="[mlflow]")  # fmt: skip

    def sharding() -> bool:
        return any((storage_of(own) / "shards").glob("*"))

    def training() -> bool:
        return any(events_of(run, "checkpoint") for run in runs_of(own, "killed"))

    def evaluating() -> bool:
        return any(any((run / "evals").glob("*.json")) for run in runs_of(own, "killed"))

    def registering() -> bool:
        last = [event for run in runs_of(own, "killed") for event in read_events(Folder(str(run)))[-1:]]
        return any(isinstance(event, StageStartEvent) and event.stage == "register" for event in last)

    killed = [kill_when(reached, own, *words) for reached in (sharding, training, evaluating, registering)]
    done = run_command(["run", str(own), *words], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_run(own, "killed")
    assert losses(run) == losses(finished)
    result = result_of(run)
    assert result["status"] == "done"
    assert result["restarts"] >= 1
    versions = answer("registry", "show", "killed", "--storage", str(storage_of(own)))
    assert [version["version"] for version in versions] == [1]
    (followed,) = mlflow_runs(storage_of(own), "killed")
    assert followed.info.status == "FINISHED" and followed.info.run_name == run.name
    assert followed.data.metrics["train/loss"] == losses(run)[24]
    assert starts(run)[0] == 0
    assert starts(run)[-1] in (6, 12, 18, 24)
    kept = committed_steps(bucket.folder("kept") / "runs" / run.name / "checkpoints")
    assert kept[-3:] == [12, 18, 24] and not (run / "checkpoints").exists()
    last, undisturbed = (result_of(one)["evaluations"][-1]["metrics"] for one in (run, finished))
    assert last == pytest.approx(undisturbed, abs=1e-6)
    wait_until_gone(lambda: [process for one in killed for process in marked_processes(one.mark)])

    refused = run_command(["run", str(own), *sets(storage=bucket.uri("all"))], tmp_path)
    assert refused.returncode == 2
    assert "checkpoint.storage" in refused.stderr
    planned = run_command(["plan", str(own), *words, "--json"], tmp_path)
    assert planned.returncode == 0
    objects = bucket.client.list_objects_v2(Bucket="yard", Prefix="kept")["Contents"]
    texts = [one.told.encode() for one in killed]
    texts += [(told.stdout + told.stderr).encode() for told in (done, refused, planned)]
    texts += [bucket.client.get_object(Bucket="yard", Key=found["Key"])["Body"].read() for found in objects]
    files = [file for folder in (storage_of(own), *(one.ray_logs for one in killed)) for file in folder.rglob("*")]
    assert {one.ray_logs.is_dir() for one in killed} == {True}
    texts += [path.read_bytes() for path in files if path.is_file()]
    assert len(texts) > 50
    assert not [text[:80] for text in texts if SECRET.encode() in text or KEY_ID.encode() in text]


def test_stopped_by_sigterm_then_evaluated_beside_training_and_stopped_early(job_file: Path, tmp_path: Path) -> None:
    """One worker on two cores leaves one to evaluate with; a metric that never improves ends the run early."""
    own = own_job(job_file, tmp_path)
    assert run_command(["shard", str(own)], tmp_path).returncode == 0
    values = {
        "name": "stopped", "scale.workers": "1", "train.steps": "4000", "train.learning_rate": "1e-12",
        "checkpoint.every_steps": "10", "checkpoint.keep": "1", "evaluate.early_stopping": "{patience: 2}",
    }  # fmt: skip
    run = coming_run(own, *(f"{name}={value}" for name, value in values.items()))
    put_faults(run, {"kind": "slow", "rank": 0, "step": 0, "seconds": 0.05, "always": True})
    words = sets(**values)
    driver = start_run(own, *words)
    wait_for(lambda: len(losses(run)) >= 5, driver.process.is_alive)
    driver.process.terminate()
    told = driver.finish()
    assert told.returncode == 75, told.stderr
    assert result_of(run)["status"] == "preempted"
    stopped_at = max(losses(run))
    assert (run / "checkpoints" / f"step-{stopped_at:08d}" / "COMMITTED").exists()

    done = start_run(own, *words).finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert starts(run) == [0, stopped_at]
    assert [event.stopped for event in events_of(run, "done")] == ["preempted", "early_stopping"]
    kinds = [event.kind for event in read_events(Folder(str(run)))]
    assert kinds.index("evaluation") < len(kinds) - 1 - kinds[::-1].index("done")
    result = result_of(run)
    assert result["steps"] < 4000
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert f"step-{result['best']['step']:08d}" in left
    assert len(left) <= 3
