"""A node agent whose ranks are no forks, as on machines with GPUs: each is a process that was ready, and spares
follow."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.training import node_agent as agent
from tests.benchmarks.bench_recovery import named_run
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_ranks_that_are_no_forks_run_and_leave_a_spare(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(40))
    shard_locally(job)
    run, kept = named_run(job, "become"), agent.NodeAgent(1)
    kept.begin(("0",))
    first = [server.process.pid for server in kept._servers]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.free_port())}
    kept.launch(run, {0: {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}}, None)
    events, ranks, deadline = [], set(), time.monotonic() + 400
    while not (seen := kept.report()).exits:
        assert time.monotonic() < deadline
        events += seen.events
        ranks |= {rank.process for rank in kept._ranks.values()} - {None}
        time.sleep(0.05)
    events += kept.report().events
    assert [rank_exit.code for rank_exit in seen.exits] == [0]
    assert ranks == set(first)
    assert [event.step for event in events if event.kind == "step"] == list(range(1, 7))
    (spare,) = kept._servers
    assert spare.process.pid not in first
    assert kept.wait_warm(60)
    kept.close()


def variables_of(kept: agent.NodeAgent) -> dict[str, str]:
    """What the environment of its rank server has; a process that has just begun shows none of it."""
    (server,) = kept._servers
    process, deadline = psutil.Process(server.process.pid), time.monotonic() + 60
    while "trainers.worker" not in process.cmdline() or not process.environ():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process.environ()


def test_ranks_without_a_gpu_see_none_of_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as Ray leaves it for actors that take no GPU
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    kept = agent.NodeAgent(1)
    try:
        kept.begin(())
        seen = variables_of(kept)
    finally:
        kept.close()
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["DS_ACCELERATOR"]) == ("", "cpu")


def test_processes_for_other_gpus_are_started_anew() -> None:
    """DeepSpeed looks for devices as it is imported."""
    kept = agent.NodeAgent(1)
    try:
        assert kept.begin(("2", "3")).gpus == ("2", "3")
        first = kept._servers[0].process
        kept.rest()
        kept.begin(("2", "3"))
        assert [server.process for server in kept._servers] == [first]
        kept.begin(("0", "1"))
        assert variables_of(kept)["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert first.wait(60) == -signal.SIGKILL
    finally:
        kept.close()
