"""The group of ranks: it grows where it is, leaves the user's network settings alone, and lets killed ranks go."""

import contextlib
import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator.training import node_agent, worker_group
from orchestrator.training.controller import Controller, _train
from orchestrator.training.kept_agents import KeptAgents
from orchestrator.training.node_report import NodeInfo
from orchestrator.training.worker_group import WorkerGroup, _Joining, _Node
from tests.orchestrator.training.test_placement import job_of
from trainers.errors import PlacementError, Preempted


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


class OtherRay:
    """A cluster of nodes with one core each, all of them taken but for `free`; what is `ready` has come."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, *nodes: str, free: tuple[str, ...] = ()) -> None:
        self.alive, self.ready, self.waits, self.killed = list(nodes), set[str](), 0, list[str]()
        free_now = {node: {"CPU": float(node in free)} for node in nodes}
        self._private = SimpleNamespace(state=SimpleNamespace(available_resources_per_node=lambda: free_now))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True, "Resources": {"CPU": 1.0}} for node in self.alive]

    def wait(self, answers: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.waits += 1
        return [one for one in answers if one in self.ready or self.waits > 3], []

    def get(self, answer: str, timeout: float) -> str:
        if answer.startswith("failed"):
            raise RuntimeError(answer)
        return answer

    def kill(self, actor: str) -> None:
        self.killed.append(actor)


def elastic(monkeypatch: pytest.MonkeyPatch, ray: OtherRay) -> WorkerGroup:
    """With one rank on node a, and room for another."""
    monkeypatch.setattr(worker_group, "ray", ray)
    group = WorkerGroup(job_of({"min": 1, "max": 2}), 0)
    group._nodes["a"] = _Node("agent a", None, 1, NodeInfo("a", "", None, (), {}))
    return group


def coming(warm: str = "warm b", age_s: float = 0.0) -> _Joining:
    return _Joining("agent b", None, 1, "began b", time.monotonic() - age_s, warm)


def test_after_a_failure_a_node_that_is_joining_is_waited_for_and_gets_no_second_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = elastic(monkeypatch, OtherRay("a", "b"))
    group._joining["b"] = coming()
    monkeypatch.setattr(group, "_begin", lambda *_: pytest.fail("a second agent was begun"))
    group.gather(0.0)
    assert group.size == 2 and not group._joining and group._nodes["b"].actor == "agent b"


@pytest.mark.parametrize("why", ["died", "late", "gone", "cordoned"])
def test_a_node_that_does_not_come_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    ray = OtherRay("a", *(["b"] if why != "gone" else []))
    group = elastic(monkeypatch, ray)
    ray.waits = 9 if why == "died" else -99
    group._joining["b"] = coming("failed b" if why == "died" else "warm b", 999.0 if why == "late" else 0.0)
    if why == "cordoned":
        group.cordon(["b"])
    group.gather(20.0)
    assert group.size == 1 and not group._joining and ray.killed == ["agent b"], "what it held is given back"


def test_nodes_whose_agents_never_come_up_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "START_S", 0.0)  # each is tried again at once
    monkeypatch.setattr(worker_group, "PATIENCE_S", 0.0)
    group = elastic(monkeypatch, OtherRay("b", "c", free=("b", "c")))
    monkeypatch.setattr(group, "_begin", lambda *_: _Joining("agent", None, 1, "failed", 0.0))
    with pytest.raises(PlacementError, match="did not come up"):
        group.gather(0.5)


def test_a_stop_while_it_waits_for_room_or_after_a_failure_is_heeded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = elastic(monkeypatch, OtherRay())
    asked = iter([False, False, True])
    with pytest.raises(Preempted, match="goes on from the newest checkpoint"):
        group.gather(300.0, lambda: next(asked))
    unused: Any = None
    with pytest.raises(Preempted):
        _train(Controller(unused, unused, unused, unused, lambda: True, group))


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
