"""The group of ranks: it grows where it is, leaves the user's network settings alone, and lets killed ranks go."""

import contextlib
import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator.training import node_agent
from orchestrator.training.kept_agents import KeptAgents
from orchestrator.training.node_report import NodeInfo
from orchestrator.training.worker_group import WorkerGroup, _Node
from tests.orchestrator.training.test_placement import job_of


def environment(monkeypatch: pytest.MonkeyPatch, of_node: dict[str, str], of_driver: dict[str, str]) -> dict[str, str]:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in of_driver.items():
        monkeypatch.setenv(name, value)
    group = WorkerGroup(job_of(1), 0)
    group._nodes["n"] = _Node(None, None, 1, NodeInfo("n", "10.0.0.1", "eth1", (), of_node))
    group.layout = {"n": [0]}
    return group._environments("n", "10.0.0.1", 29500)[0]


def test_the_interface_of_the_address_is_named_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(monkeypatch, {}, {})
    assert found["NCCL_SOCKET_IFNAME"] == "=eth1", "without the sign, eth10 matches too"
    assert found["GLOO_SOCKET_IFNAME"] == "eth1", "gloo knows whole names only"


def test_what_the_node_or_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(monkeypatch, {"NCCL_SOCKET_IFNAME": "ib0"}, {"GLOO_SOCKET_IFNAME": "bond0"})
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("ib0", "bond0")


@pytest.mark.parametrize(("gpus", "left"), [(("0",), 0), ((), 1)])
def test_a_killed_rank_on_a_gpu_gets_time_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], left: int
) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > node_agent.GPU_KILL_WAIT_S / 2:
            rank.exit = "gone"

    monkeypatch.setattr(node_agent, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(node_agent.os, "kill", lambda *_: None)
    monkeypatch.setattr(node_agent.os, "close", lambda *_: None)
    rank: Any = SimpleNamespace(exit=None, process=1, server=None, events=0, files="/nowhere")
    agent: Any = node_agent.NodeAgent.__new__(node_agent.NodeAgent)
    agent._gpus, agent._ranks = gpus, {0: rank}
    agent.kill()
    assert (rank.exit is None) == bool(left)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_an_elastic_group_grows_on_a_node_that_it_holds() -> None:
    import ray

    @ray.remote(num_cpus=1)
    class Tenant:
        def here(self) -> None:
            pass

    tenant = Tenant.remote()
    ray.get(tenant.here.remote())
    group = WorkerGroup(job_of({"min": 1, "max": 2}), 0)
    try:
        group.gather(400)
        assert group.size == 1 and not group.can_grow()
        ray.kill(tenant)
        deadline = time.monotonic() + 400
        while not group.can_grow():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        group.gather(400)
        assert group.size == 2 and len(group.layout) == 1
    finally:
        group.close()


def rank_servers() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "trainers.worker"]:
                found.add(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_the_next_training_of_a_process_finds_the_rank_servers_of_the_last() -> None:
    """Between the two nobody holds a core. One that has other cores, or is on a node that is not used again, ends."""
    import ray

    kept, before, seen = KeptAgents(), rank_servers(), []
    for cpus, elsewhere in ((1, False), (1, False), (2, False), (2, True)):
        if elsewhere:
            (idle,) = kept._idle.values()
            kept._idle = {"another node": idle}
        with closing(WorkerGroup(job_of(1, cpus_per_worker=cpus), 0, kept)) as group:
            group.gather(400)
            assert ray.available_resources().get("CPU", 0) == 2 - cpus
            deadline = time.monotonic() + 60
            while len(there := rank_servers() - before) != 1:  # one that is not taken again is on its way out
                assert time.monotonic() < deadline
                time.sleep(0.1)
            seen.append(there)
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert seen[0] == seen[1] and len(set(map(frozenset, seen))) == 3
    kept.close()
    deadline = time.monotonic() + 60
    while rank_servers() - before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
