"""Reading events.jsonl: the ends of a long log without what lies between, and one event a step.

A restart repeats steps, so the later word counts. `trainers/run/log.py` writes the log and reads it whole.
"""

import json
from collections.abc import Iterable
from typing import Any

from trainers.run.log import EVENTS
from trainers.storage import Folder

Event = dict[str, Any]

HEAD_BYTES = 1 << 14
TAIL_BYTES = 1 << 18


def outer_events(run: Folder) -> list[Event]:
    """The first and the last events of a run, in order; empty where there are none.

    Lines that are not whole (the writer was killed, or is writing) and lines that are no event are left out.
    """
    try:
        size = run.size(EVENTS)
        if size == 0:
            return []
        with run.open_input(EVENTS) as stream:
            if size <= HEAD_BYTES + TAIL_BYTES:
                return _parse(bytes(stream.read(size)).split(b"\n"))
            head = bytes(stream.read(HEAD_BYTES)).split(b"\n")[:-1]
            stream.seek(size - TAIL_BYTES)
            return _parse(head + bytes(stream.read(TAIL_BYTES)).split(b"\n")[1:])
    except FileNotFoundError:
        return []


def steps_of(events: Iterable[Event]) -> list[Event]:
    """The step events, one a step, in order of the step."""
    chosen = (event for event in events if event.get("kind") == "step" and isinstance(event.get("step"), int))
    by_step = {event["step"]: event for event in chosen}
    return [by_step[step] for step in sorted(by_step)]


def _parse(lines: Iterable[bytes]) -> list[Event]:
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events
