"""A node is lost for real: of two hosts (network namespaces) one is killed whole, or cut off; the run goes on."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import PORT, UNAVAILABLE, Host, two_hosts
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.run.events import read_events
from trainers.run.folder import run_folder
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)]
STEPS, STEP_S, SMALLER_WITHIN_S = 100, 0.25, 30.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Job:
    """A job of slow steps, elastic between one and two workers."""
    folder = tmp_path_factory.mktemp("job")
    job: Job = tiny_job(
        folder,
        make_bert(folder / "model", tiny_tokenizer, dropout=0.0),
        "classify",
        film_rows(120),
        train={"steps": STEPS, "learning_rate": 1e-4},
        scale={"workers": {"min": 1, "max": 2}},
        checkpoint={"every_steps": 10},
        evaluate={"while_training": False},
    )
    return job


def write_job(job: Job, name: str) -> tuple[Path, Path]:
    """The job under a name, slowed down. Returns its file and its run folder."""
    job = job.model_copy(update={"name": name, "storage": f"{job.storage}-{name}"})
    shards, model = shard_locally(job), find_model(job)
    assert model is not None
    run = run_folder(job, model.digest, shards).path
    shutil.rmtree(Path(job.storage) / "shards")  # written to know the run folder's name; the run writes its own
    run.mkdir(parents=True)
    slow = [{"kind": "slow", "rank": rank, "step": 0, "seconds": STEP_S, "always": True} for rank in range(2)]
    (run / "faults.json").write_text(json.dumps(slow))
    path = Path(job.storage).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path, run


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> dict[int, float]:
    """Losses of the same job on one worker that nothing happens to."""
    raw = job.model_dump(mode="json") | {"name": "undisturbed", "scale": {"workers": 1}}
    path = Path(job.storage).with_name("undisturbed.yaml")
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = Path(raw["storage"]).glob("runs/undisturbed-????????")
    return {event.step: event.loss for event in events_of(run, "step")}


def events_of(run: Path, kind: str) -> list[Any]:
    return [event for event in read_events(Folder(str(run))) if event.kind == kind]


def wait_for(reached: Callable[[], bool], driver: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_node_that_is_about_to_go_is_left_in_time(hosts: tuple[Host, Host], job: Job, tmp_path: Path) -> None:
    """A preemption notice: with a fixed number of workers the run commits and exits 75, else it goes on with fewer."""
    first, second = hosts
    job_file, run = write_job(job, "drained")
    log = tmp_path / "driver.log"
    for workers in ("2", "{min: 1, max: 2}"):
        launches = len(events_of(run, "start"))
        command = first.command(
            sys.executable, "-m", "orchestrator", "run", str(job_file), "--address", f"{first.address}:{PORT}",
            "--set", f"scale.workers={workers}",
        )  # fmt: skip
        with log.open("wb") as stream:
            driver = subprocess.Popen(command, env=first.environment(), stdout=stream, stderr=stream)
        try:
            wait_for(lambda n=launches: len(events_of(run, "start")) > n, driver, log)
            steps = len(events_of(run, "step"))
            wait_for(lambda n=steps: len(events_of(run, "step")) > n + 2, driver, log)
            second.drain(first)
            if workers == "2":
                assert driver.wait(timeout=400) == 75, log.read_text()
                assert events_of(run, "done")[-1].stopped == "preempted"
            else:
                wait_for(lambda n=launches: len(events_of(run, "start")) > n + 1, driver, log)
                assert [event.world_size for event in events_of(run, "start")] == [2, 2, 1]
                assert events_of(run, "done")[-1].stopped == "resize"
        finally:
            driver.kill()
            driver.wait()
        second.kill_everything()
        second.start_ray(first)
        assert (run / "checkpoints" / f"step-{events_of(run, 'done')[-1].step:08d}" / "COMMITTED").exists()
    assert not events_of(run, "restart")


@pytest.mark.parametrize("how", ["killed", "cut-off"])
def test_a_lost_node_costs_a_moment_and_no_step(
    hosts: tuple[Host, Host], how: str, job: Job, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    first, second = hosts
    job_file, run = write_job(job, how)
    log = tmp_path / "driver.log"
    command = first.command(
        sys.executable, "-m", "orchestrator", "run", str(job_file), "--address", f"{first.address}:{PORT}"
    )
    with log.open("wb") as stream:
        driver = subprocess.Popen(command, env=first.environment(), stdout=stream, stderr=stream)
    try:
        wait_for(lambda: len(events_of(run, "step")) >= 15, driver, log)
        assert [event.world_size for event in events_of(run, "start")] == [2]
        if how == "killed":
            second.kill_everything()
        else:
            second.set_link("down")
        lost_at = time.time()
        wait_for(lambda: len(events_of(run, "start")) >= 2, driver, log)
        wait_for(lambda: events_of(run, "step")[-1].time > events_of(run, "start")[1].time, driver, log)
        seconds = events_of(run, "step")[-1].time - lost_at
        print(f"\n{how}: {seconds:.1f} s to the first step with one worker")
        assert events_of(run, "start")[1].world_size == 1
        assert seconds < SMALLER_WITHIN_S
        assert "lost the node" in events_of(run, "restart")[0].cause

        second.kill_everything()
        second.set_link("up")
        second.start_ray(first)
        wait_for(lambda: len(events_of(run, "start")) >= 3, driver, log)
        assert driver.wait(timeout=400) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    starts = events_of(run, "start")
    assert [start.world_size for start in starts] == [2, 1, 2]
    assert starts[1].step >= 10
    resized = [event for event in events_of(run, "done") if event.stopped == "resize"]
    assert [event.step for event in resized] == [starts[2].step]
    steps = {event.step: event.loss for event in events_of(run, "step")}
    assert set(steps) == set(range(1, STEPS + 1))
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert steps == pytest.approx(undisturbed, abs=1e-5)
