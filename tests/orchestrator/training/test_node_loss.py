"""A node is lost for real: of two hosts (network namespaces) one is killed whole, or cut off; the run goes on."""

import contextlib
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

from tests.forked import run_command
from tests.hosts import PORT, UNAVAILABLE, Host, two_hosts
from tests.ray_head import free_ports
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.run.events import read_events
from trainers.run.folder import run_folder
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)]
STEPS, EVERY_STEPS, STEP_S, SMALLER_WITHIN_S = 80, 5, 10.0, 60.0
"""Steps take so long where all that they do is wait for what happens next; after that they are no longer slow."""


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
        checkpoint={"every_steps": EVERY_STEPS, "keep": 1},  # one to evaluate
        evaluate={"while_training": False},
    )
    return job


def write_job(job: Job) -> tuple[Path, Path]:
    """The job, slowed down. Returns its file and its run folder."""
    shards, model = shard_locally(job), find_model(job)
    assert model is not None
    run = run_folder(job, model.digest, shards).path
    shutil.rmtree(Path(job.storage) / "shards")  # written to know the run folder's name; the run writes its own
    run.mkdir(parents=True)
    slow = {"kind": "linger", "rank": 0, "step": 0, "seconds": STEP_S, "always": True}
    (run / "faults.json").write_text(json.dumps([slow]))
    path = Path(job.storage).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path, run


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> dict[int, float]:
    """Losses of the same job on one worker that nothing happens to."""
    storage = Path(job.storage).with_name("undisturbed")
    storage.mkdir()
    alone = job.model_copy(update={"storage": str(storage), "scale": job.scale.model_copy(update={"workers": 1})})
    shard_locally(alone)
    path = storage / "job.yaml"
    path.write_text(yaml.safe_dump(alone.model_dump(mode="json")), encoding="utf-8")
    (port,) = free_ports(1)
    contract = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = run_command([str(path)], storage, "trainers.__main__", **contract)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = storage.glob("runs/*")
    return {event.step: event.loss for event in events_of(run, "step")}


def events_of(run: Path, kind: str) -> list[Any]:
    return [event for event in read_events(Folder(str(run))) if event.kind == kind]


def wait_for(reached: Callable[[], bool], driver: "subprocess.Popen[bytes]", log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def driven(host: Host, job_file: Path, log: Path, workers: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`tuneyard run` on that host's Ray for the length of the block."""
    command = host.command(
        sys.executable, "-m", "orchestrator", "run", str(job_file), "--address", f"{host.address}:{PORT}",
        "--set", f"scale.workers={workers}",
    )  # fmt: skip
    with log.open("wb") as stream:
        driver = subprocess.Popen(command, env=host.environment(), stdout=stream, stderr=stream)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def test_a_node_that_goes_costs_a_moment_and_no_step(
    hosts: tuple[Host, Host], job: Job, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """A preemption notice: with a fixed number of workers the run commits and exits 75, else it goes on with fewer.
    Then the node is killed, then cut off. Each time it comes back, and so does the second worker."""
    first, second = hosts
    job_file, run = write_job(job)
    log = tmp_path / "driver.log"

    def sizes() -> list[int]:
        return [event.world_size for event in events_of(run, "start")]

    def wait_for_steps(driver: "subprocess.Popen[bytes]", *expected: int) -> None:
        """Until the newest launch, of which these are the world sizes so far, has made three steps."""
        wait_for(lambda: len(sizes()) >= len(expected), driver, log)
        began = events_of(run, "start")[-1].time
        wait_for(lambda: sum(event.time > began for event in events_of(run, "step")) >= 3, driver, log)
        assert sizes() == list(expected)

    def come_back() -> None:
        second.kill_everything()
        second.set_link("up")
        second.start_ray(first)

    with driven(first, job_file, log, "2") as driver:
        wait_for_steps(driver, 2)
        second.drain(first)
        assert driver.wait(timeout=400) == 75, log.read_text()
        assert committed_end(run).stopped == "preempted"
    come_back()

    with driven(first, job_file, log, "{min: 1, max: 2}") as driver:
        wait_for_steps(driver, 2, 2)
        second.drain(first)
        wait_for_steps(driver, 2, 2, 1)
        assert committed_end(run).stopped == "resize"
        assert not events_of(run, "restart")
        come_back()
        wait_for_steps(driver, 2, 2, 1, 2)

        for turn, lose in enumerate((second.kill_everything, lambda: second.set_link("down"))):
            made = events_of(run, "step")[-1].step
            lose()
            lost_at = time.time()
            wait_for_steps(driver, *sizes(), 1)
            again = next(
                event.time for event in events_of(run, "step") if event.time > events_of(run, "start")[-1].time
            )
            print(f"\n{('killed', 'cut off')[turn]}: {again - lost_at:.1f} s to the first step with one worker")
            assert again - lost_at < SMALLER_WITHIN_S
            assert "lost the node" in events_of(run, "restart")[turn].cause
            assert events_of(run, "start")[-1].step >= made // EVERY_STEPS * EVERY_STEPS - EVERY_STEPS
            if turn:
                (run / "faults.json").write_text("[]")  # the rest at full speed
            come_back()
            wait_for_steps(driver, *sizes(), 2)
        assert driver.wait(timeout=400) == 0, log.read_text()

    assert sizes() == [2, 2, 1, 2, 1, 2, 1, 2]
    assert len(events_of(run, "restart")) == 2
    resumed = [start.step for start in events_of(run, "start")]
    resized = [event.step for event in events_of(run, "done") if event.stopped == "resize"]
    assert resized == [resumed[2], resumed[3], resumed[5], resumed[7]]
    steps = {event.step: event.loss for event in events_of(run, "step")}
    assert set(steps) == set(range(1, STEPS + 1))
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert steps == pytest.approx(undisturbed, abs=1e-5)


def committed_end(run: Path) -> Any:
    """How the last launch ended; its last step was committed, and may be gone where a later one was since."""
    end = events_of(run, "done")[-1]
    assert end.step in [event.step for event in events_of(run, "checkpoint")]
    return end
