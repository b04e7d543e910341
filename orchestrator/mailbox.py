"""Carries events from rank 0 to the controller and the wish to stop back. The only bridge between the two packages."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = dict[str, Any]
FLUSHED = ("start", "checkpoint", "done", "refused")
"""Kinds of events after which the sender waits until they have arrived."""


class _Box:
    """The actor's state: events not yet fetched, and the stop reason."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop: str | None = None

    def put(self, event: Event) -> str | None:
        """Add an event; answers with the stop reason."""
        self._events.append(event)
        if event["kind"] == "refused":
            self._stop = "refused"
        return self._stop

    def stop_reason(self) -> str | None:
        """Why the ranks should stop, if they should."""
        return self._stop

    def fetch(self) -> list[Event]:
        """Take all events that came since the last call."""
        events, self._events = self._events, []
        return events

    def ask_to_stop(self, reason: str | None) -> None:
        """Have the ranks stop after their current step."""
        self._stop = reason


class Mailbox:
    """The controller's end."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Box).remote()

    def fetch(self) -> list[Event]:
        """Events since the last call, in order."""
        events: list[Event] = ray.get(self.actor.fetch.remote())
        return events

    def ask_to_stop(self, reason: str | None) -> None:
        """Have the ranks stop after their current step, each committing it."""
        ray.get(self.actor.ask_to_stop.remote(reason))


class RayHooks:
    """The ranks' end: `trainers.loop.Hooks` over an actor, without waiting for it in the step."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._pending: Any = None
        self._stop: str | None = None

    def emit(self, event: Mapping[str, Any]) -> None:
        """Send an event; the important ones wait for their arrival."""
        self._pending = self._actor.put.remote(dict(event))
        if event["kind"] in FLUSHED:
            self._stop = ray.get(self._pending)

    def stop_reason(self) -> str | None:
        """The controller's wish, as of the last answer that has come."""
        if self._pending is not None and ray.wait([self._pending], timeout=0)[0]:
            self._stop, self._pending = ray.get(self._pending), None
        return self._stop

    def ask_now(self) -> str | None:
        """The controller's wish, waited for."""
        reason: str | None = ray.get(self._actor.stop_reason.remote())
        return reason
