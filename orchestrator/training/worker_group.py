"""The ranks of a job as one group: node agents on the nodes that hold them, launched, watched and ended together.

Ray places and runs the node agents; which nodes and how many ranks is decided by `orchestrator.training.placement`. A
node that does not answer for `ANSWER_S` is given up, whatever the cluster still believes of it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray

from orchestrator.training.kept_agents import ANSWER_S, KeptAgents, Room, end_agent, start_agent
from orchestrator.training.node_agent import GPU_KILL_WAIT_S
from orchestrator.training.node_report import NodeInfo, NodeReport
from orchestrator.training.placement import Slots, assign_ranks, fitting_sizes, largest_size, slots_of, with_room
from trainers.errors import PlacementError, Preempted
from trainers.job.schema import Job
from trainers.records import StopReason
from trainers.run.record import Run

START_S = 60.0
"""A node agent must be up within this; its node is left alone for as long where it is not."""
WARM_S = 120.0
PATIENCE_S = 5.0
"""How long resources that are busy may take to come free before fewer workers are taken: what the shards' tasks held is
reported free with a delay."""


@dataclass
class _Node:
    """One node of the group. Its agent lives through all launches of a training, with the cores and GPUs of its
    ranks."""

    actor: Any
    room: Room | None
    """Of an agent that is kept; else it is the agent's own."""
    slots: int
    info: NodeInfo
    answer: Any = None
    """The report that is under way."""
    asked: float = 0.0


@dataclass(frozen=True)
class _Joining:
    """A node agent that is on its way up, on a node that the group may grow onto."""

    actor: Any
    room: Room | None
    slots: int
    began: Any
    """Answers, once it is up, with what there is to know of the node."""
    since: float
    warm: Any = None
    """Answers once its imports are done."""


class WorkerGroup:
    """The node agents of one job, kept through all its launches.

    Args:
        gpus: of each rank.
        kept: where the agents come from and go to, of a process that trains more than once; else they end.
    """

    def __init__(self, job: Job, gpus: int, kept: KeptAgents | None = None) -> None:
        self._job, self._cpus, self._gpus, self._kept = job, job.scale.cpus_per_worker, gpus, kept
        self._nodes: dict[str, _Node] = {}
        self._joining: dict[str, _Joining] = {}
        self._cordoned: dict[str, float] = {}
        self.layout: dict[str, list[int]] = {}
        """Ranks by node, of the last launch."""

    @property
    def size(self) -> int:
        """World size of the last launch."""
        return sum(len(ranks) for ranks in self.layout.values())

    def gather(self, wait_s: float, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Have node agents for the largest world size that the cluster holds now.

        Raises:
            PlacementError: where it does not hold the smallest within `wait_s`, or agents do not come up on it.
            Preempted: where it is asked to stop meanwhile.
        """
        began = time.monotonic()
        while True:
            if asked_to_stop():
                raise Preempted("stopped before its ranks ran; the same command goes on from the newest checkpoint")
            self._admit()
            candidates = self._candidates()
            size, waited = largest_size(fitting_sizes(self._job), candidates), time.monotonic() - began
            if size is not None and (waited > PATIENCE_S or size == self._possible_size()):
                wanted = assign_ranks(size, candidates)
                if not wanted.keys() & self._joining.keys() and all(
                    self._acquire(node, len(ranks)) for node, ranks in wanted.items()
                ):
                    self._settle_on(wanted)
                    return
            if waited > wait_s and not self._joining:
                raise PlacementError(self._nothing_fits(wait_s))
            time.sleep(0.2)

    def _settle_on(self, wanted: dict[str, list[int]]) -> None:
        """The next launch's ranks by node; what is held beside them is given back."""
        for node in self._nodes.keys() - wanted.keys():
            self._leave(node)
        for node in list(self._joining):
            _end(self._joining.pop(node))
        if self._kept is not None:
            self._kept.close()
        self.layout = wanted

    def _usable(self) -> set[str]:
        now = time.monotonic()
        return {node for node in alive_nodes() if self._cordoned.get(node, 0.0) < now}

    def _possible_size(self) -> int | None:
        """The world size once everything that is busy now were free."""
        usable = self._usable()
        nodes = [
            Slots(node["NodeID"], slots_of(node["Resources"], self._cpus, self._gpus))
            for node in ray.nodes()
            if node["NodeID"] in usable
        ]
        return largest_size(fitting_sizes(self._job), nodes)

    def _nothing_fits(self, wait_s: float) -> str:
        room = {node.node[:8]: node.slots for node in self._candidates()}
        others = ", ".join(sorted(node[:8] for node in alive_nodes() - self._usable())) or "none"
        return (
            f"no node has had room for {self._job.scale.min_workers} workers for {wait_s:.0f} s (workers that fit, by "
            f"node: {room}; nodes that go, or whose agent did not come up or answer: {others}); add nodes, or lower "
            f"scale.workers or what each worker takes"
        )

    def _candidates(self) -> list[Slots]:
        """Nodes that could hold ranks now."""
        free, usable = ray._private.state.available_resources_per_node(), self._usable()
        held = {node: agent.slots for node, agent in (self._nodes | self._joining).items() if node in usable}
        room = {node: slots_of(free.get(node, {}), self._cpus, self._gpus) for node in usable - self._joining.keys()}
        return with_room(fitting_sizes(self._job), room, held, self._job.scale.max_workers)

    def _acquire(self, node: str, slots: int) -> bool:
        """Have a node agent with room for that many ranks there; False if it does not come up: the node is left alone
        for a while. One with less room is replaced."""
        if node in self._nodes:
            if self._nodes[node].slots >= slots:
                return True
            self._leave(node)
        return self._take_in(node, self._begin(node, slots))

    def _begin(self, node: str, slots: int) -> _Joining:
        cpus, gpus = slots * self._cpus, slots * self._gpus
        if self._kept is None:
            room, agent = None, start_agent(node, self._cpus, cpus, gpus)
        else:
            room, agent = Room(node, cpus, gpus), self._kept.take(node, self._cpus)
        return _Joining(agent, room, slots, agent.begin.remote(room and room.gpus()), time.monotonic())

    def _take_in(self, node: str, coming: _Joining) -> bool:
        try:
            info = ray.get(coming.began, timeout=START_S)
            if coming.warm is not None:
                ray.get(coming.warm, timeout=START_S)  # an error where the agent has died since it was up
        except (ray.exceptions.RayError, TimeoutError):
            self._cordon(node, coming)
            return False
        self._nodes[node] = _Node(coming.actor, coming.room, coming.slots, info)
        return True

    def _cordon(self, node: str, gone: "_Joining | _Node") -> None:
        self._cordoned[node] = time.monotonic() + START_S
        _end(gone)

    def _leave(self, node: str) -> None:
        """Give the room back; the agent ends, unless it is kept."""
        member = self._nodes.pop(node)
        if self._kept is None or member.room is None:
            end_agent(member.actor)
        else:
            self._kept.keep(node, self._cpus, member.actor)
            member.room.release()

    def launch(self, run: Run) -> None:
        """Start the ranks of the layout. Raises ray.exceptions.RayError where a node does not answer."""
        first = self._nodes[next(iter(self.layout))]
        port = ray.get(first.actor.free_port.remote(), timeout=START_S)
        logs = str((run.folder / "logs").path) if run.folder.is_local else None
        started = [
            member.actor.launch.remote(run, self._environments(node, first.info.address, port), logs)
            for node, member in self._nodes.items()
        ]
        ray.get(started, timeout=WARM_S)

    def _environments(self, node: str, address: str, port: int) -> dict[int, dict[str, str]]:
        """The launcher contract of each rank of a node, and the interface its collectives go through."""
        info = self._nodes[node].info
        shared = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(self.size)}
        shared |= info.environment()
        ranks = self.layout[node]
        return {rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(ranks.index(rank))} for rank in ranks}

    def report(self, wait_s: float) -> NodeReport:
        """Ask every node once, waiting no longer than `wait_s` for slow ones."""
        now, merged = time.monotonic(), NodeReport()
        for member in self._nodes.values():
            if member.answer is None:
                member.answer, member.asked = member.actor.report.remote(), now
        answers = [member.answer for member in self._nodes.values()]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=wait_s) if answers else ([], [])
        for node, member in self._nodes.items():
            if member.answer in ready:
                answer, member.answer = member.answer, None
                try:
                    merged.merge(ray.get(answer))
                except ray.exceptions.RayError:
                    merged.lost.append(node)
            elif time.monotonic() - member.asked > ANSWER_S:
                merged.lost.append(node)
        for node in merged.lost:  # they do not count until they have had time to be declared dead, or to come back
            self._cordon(node, self._nodes.pop(node))
        return merged

    def cordon(self, nodes: Iterable[str]) -> None:
        """Leave nodes that are about to be taken away out of the next launch."""
        for node in nodes:
            self._cordoned[node] = time.monotonic() + START_S

    def can_grow(self) -> bool:
        """Whether more ranks could run than do, on node agents that are up and warm. Never waits: asked now and
        then."""
        self._admit()
        candidates = self._candidates()
        size = largest_size(fitting_sizes(self._job), candidates)
        if size is None or size <= self.size:
            return False
        wanted = assign_ranks(size, candidates)
        for node in wanted.keys() - self._nodes.keys() - self._joining.keys():
            coming = self._begin(node, len(wanted[node]))
            self._joining[node] = replace(coming, warm=coming.actor.wait_warm.remote(WARM_S))
        return wanted.keys() <= self._nodes.keys()

    def _admit(self) -> None:
        """Take in node agents that have come up; the nodes of those that do not are left alone for a while."""
        for node, coming in list(self._joining.items()):
            if ray.wait([coming.warm], timeout=0)[0]:
                self._take_in(node, self._joining.pop(node))
            elif time.monotonic() - coming.since > START_S + WARM_S:
                self._cordon(node, self._joining.pop(node))

    def ask_to_stop(self, reason: StopReason) -> None:
        """Have every rank stop at the end of its step."""
        for member in self._nodes.values():
            member.actor.ask_to_stop.remote(reason)

    def stacks(self) -> dict[int, tuple[str, str]]:
        """Process state and stacks by rank, of the nodes that answer."""
        by_rank: dict[int, tuple[str, str]] = {}
        answers = [member.actor.stacks.remote() for member in self._nodes.values()]
        for answer in ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)[0] if answers else []:
            with contextlib.suppress(ray.exceptions.RayError):
                by_rank |= ray.get(answer)
        return by_rank

    def kill(self) -> None:
        """End every rank at once; the node agents stay."""
        answers = [member.actor.kill.remote() for member in self._nodes.values()]
        if answers:
            ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S + (GPU_KILL_WAIT_S if self._gpus else 0))

    def close(self) -> None:
        """Give everything back; the node agents end, unless they are kept."""
        for node in list(self._nodes):
            self._leave(node)
        for node in list(self._joining):
            _end(self._joining.pop(node))


def _end(gone: _Joining | _Node) -> None:
    """At once, with its room; nothing is waited for."""
    ray.kill(gone.actor)
    if gone.room is not None:
        gone.room.release()


def alive_nodes() -> set[str]:
    """Ids of the nodes that the cluster believes alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away, by a preemption notice or `ray drain-node`."""
    return set(ray._private.state.state.get_draining_nodes())
