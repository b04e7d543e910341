"""events.jsonl of a run: one JSON object a line, appended while the run goes on. Reading it back, whole or its end.

A restart repeats steps, so later events win. A line that is not whole yet (the writer was killed, or is writing) is
left out, as are lines that are no event; both are counted by nobody because the checkpoints hold the truth.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from trainers.storage import Folder

EVENTS = "events.jsonl"
Event = dict[str, Any]


def read_events(run: Folder, tail_bytes: int | None = None) -> list[Event]:
    """The events of a run in the order they were written, or those in its last bytes; empty where there are none."""
    try:
        size = run.size(EVENTS)
        if size == 0:
            return []
        with run.open_input(EVENTS) as stream:
            start = max(0, size - tail_bytes) if tail_bytes else 0
            stream.seek(start)
            lines = bytes(stream.read(size - start)).split(b"\n")
    except FileNotFoundError:
        return []
    whole = lines[1:] if start else lines
    return [event for line in whole if (event := _parse(line)) is not None]


def steps_of(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The step events, one a step, in order of the step; the later word counts."""
    return _latest(events, "step")


def evaluations_of(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The evaluation events, one a step, in order of the step; the later word counts."""
    return _latest(events, "evaluation")


def _latest(events: Iterable[Mapping[str, Any]], kind: str) -> list[Event]:
    chosen = (event for event in events if event.get("kind") == kind and isinstance(event.get("step"), int))
    by_step = {event["step"]: dict(event) for event in chosen}
    return [by_step[step] for step in sorted(by_step)]


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
