"""Node agents that are kept from one training of a process to its next, and the room of their ranks meanwhile.

An agent that is kept holds no cores and no GPUs: somebody else may need them between two trainings. It stays up with a
rank server whose imports are done.
"""

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.training.node_agent import GPU_KILL_WAIT_S, NodeAgent, own_gpus

ANSWER_S = 10.0
"""A node agent that has not answered for this long is lost; one answer takes about 2 ms."""


def start_agent(node: str, cpus_per_worker: int, cpus: int = 0, gpus: int = 0) -> Any:
    """A node agent that holds these cores and GPUs as long as it lives."""
    return _there(NodeAgent, node, cpus, gpus).remote(cpus_per_worker)


def end_agent(agent: Any) -> None:
    """With everything that it started."""
    ray.wait([agent.close.remote()], timeout=ANSWER_S)
    ray.kill(agent)


def _there(actor: type, node: str, cpus: int, gpus: int) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(actor).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=affinity)


class _Holder:
    """Has cores and GPUs as long as it lives."""

    def gpus(self) -> tuple[str, ...]:
        return own_gpus()


class Room:
    """Cores and GPUs of one node, for an agent that has none: until `release`, or until the process that took them
    ends."""

    def __init__(self, node: str, cpus: int, gpus: int) -> None:
        self._holder = _there(_Holder, node, cpus, gpus).remote()

    def gpus(self) -> Any:
        """A reference to the ids of its GPUs, which are known once Ray has given the room."""
        return self._holder.gpus.remote()

    def release(self) -> None:
        """Give it back."""
        ray.kill(self._holder)


class KeptAgents:
    """Node agents between two trainings of one process: no room, no ranks, one a node at the most."""

    def __init__(self) -> None:
        self._idle: dict[str, tuple[int, Any]] = {}

    def take(self, node: str, cpus: int) -> Any:
        """The agent that was kept of a node, if it fits and answers, or else a new one.

        Args:
            cpus: a rank's.
        """
        had, agent = self._idle.pop(node, (0, None))
        if had == cpus:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(agent.rest.remote(), timeout=ANSWER_S)
                return agent
        if agent is not None:
            ray.kill(agent)
        return start_agent(node, cpus)

    def keep(self, node: str, cpus: int, agent: Any) -> None:
        """Until the next training, once its ranks are gone."""
        if ray.wait([agent.rest.remote()], timeout=ANSWER_S + GPU_KILL_WAIT_S)[0]:
            self._idle[node] = cpus, agent
        else:
            ray.kill(agent)

    def close(self) -> None:
        """End those that nobody took."""
        for _, agent in self._idle.values():
            end_agent(agent)
        self._idle.clear()
