"""Four ways to launch the same job give the same losses; the launchers without Ray need its shards, as README says."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.forked import run_command
from tests.ray_head import free_ports
from tests.whole_run import (
    PATIENCE_S,
    answer,
    call,
    coming_run,
    environment,
    events_of,
    find_run,
    losses,
    own_job,
    put_faults,
    result_of,
    sets,
    starts,
    storage_of,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def own(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, with its shards written by `tuneyard shard`."""
    path = own_job(job_file, tmp_path_factory.mktemp("launchers"))
    done = run_command(["shard", str(path)], path.parent)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_without_ray_give_the_same_losses(finished: Path, own: Path, launcher: str) -> None:
    configuration = Path(__file__).parents[2] / "ds_configs" / "accelerate-2proc.yaml"
    (port,) = free_ports(1)
    start = {
        "torchrun": ["torchrun", "--nproc-per-node=2", f"--master-port={port}"],
        "accelerate": ["accelerate", "launch", f"--config_file={configuration}", f"--main_process_port={port}"],
    }[launcher]
    done = call(*start, "-m", "trainers", str(own), *sets(name=launcher))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(find_run(own, launcher)) == losses(finished)
    assert "it/s]" not in done.stderr and "FutureWarning" not in done.stderr


def test_a_submitted_job_whose_worker_and_then_driver_are_killed_goes_on_when_submitted_by_hand(
    finished: Path, own: Path, head: str
) -> None:
    """`tuneyard submit` first: a worker is killed and restarted from the newest checkpoint, then the driver is killed.
    `ray job submit` of the same job then ends with the losses of an undisturbed run."""
    run = coming_run(own, "name=again")
    slow = {"kind": "slow", "rank": 0, "step": 0, "seconds": 0.05, "always": True}
    put_faults(run, slow, {"kind": "kill", "rank": 1, "step": 11, "committed": 6})
    words = [sys.executable, "-m", "orchestrator", "submit", str(own), "--address", head, *sets(name="again")]
    disabled = {"RAY_AUTH_MODE": "disabled"}
    first = subprocess.Popen(words, env=environment(**disabled), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(losses(run)) >= 14, lambda: first.poll() is None)
    command = ["-m", "orchestrator", "run", "job.yaml"]
    (driver,) = [one for one in psutil.Process().children(recursive=True) if command_line(one)[1:] == command]
    driver.kill()
    told, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode not in (0, 2)
    (restart,) = events_of(run, "restart")
    assert "rank 1" in restart.cause
    assert "was killed by SIGKILL" in restart.cause
    assert f"training failed: {restart.cause}" in told, "the terminal tells what was healed"
    assert "training on 2 workers, resumed after step 6" in told

    program = f"{Path(sys.executable).parent}/tuneyard"
    by_hand = ["ray", "job", "submit", "--address", head, "--", program, "run", str(own), *sets(name="again")]
    done = call(*by_hand, **disabled)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered again version 1" in done.stdout
    assert losses(run) == losses(finished)
    assert starts(run)[:2] == [0, 6]
    assert starts(run)[-1] in (6, 12, 18, 24)
    assert result_of(run)["restarts"] == len(starts(run)) - 1
    versions = answer("registry", "show", "again", "--storage", str(storage_of(own)))
    assert [version["version"] for version in versions] == [1]


def command_line(process: psutil.Process) -> list[str]:
    """Nothing of a process that is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
