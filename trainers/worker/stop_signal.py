"""How a rank hears that it should stop: SIGTERM to itself, or its node agent's word on the heartbeat page."""

import os
import signal
import threading
import time
from typing import Any

from trainers.errors import Preempted
from trainers.records import Phase, StopReason
from trainers.run.events import Event
from trainers.worker.heartbeat import HeartbeatPage


class StopSignal:
    """Remembers SIGTERM, also while the main thread is blocked in a collective: a thread of its own hears it at once.

    Made in the main thread, before anything that takes long. Once the grace time is over the machine is about to go:
    a process that has not ended by itself then ends with exit code 75.
    """

    def __init__(self, grace_s: float, heartbeat: HeartbeatPage | None = None) -> None:
        self.came = False
        self._grace_s, self._heartbeat = grace_s, heartbeat
        self._ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # what counts is the byte that the wakeup descriptor gets
        threading.Thread(target=self._listen, name="stop-signal", daemon=True).start()

    def _listen(self) -> None:
        while signal.SIGTERM not in os.read(self._ear, 64):
            pass
        self.came = True
        if self._heartbeat:
            self._heartbeat.tell()
        time.sleep(self._grace_s)
        os._exit(Preempted.exit_code)

    def reason(self) -> StopReason | None:
        """preempted after SIGTERM, else what the node agent asked."""
        return "preempted" if self.came else self._heartbeat.stop_reason() if self._heartbeat else None


class PipeHooks:
    """`trainers.training.loop.Hooks` of a rank that a node agent started: events leave as JSON lines, the heartbeat is
    kept."""

    def __init__(self, events: Any, heartbeat: HeartbeatPage, stop: StopSignal) -> None:
        self._events, self._heartbeat, self._stop = events, heartbeat, stop

    def emit(self, event: Event) -> None:
        """Send an event; it has left this process when this returns."""
        self._events.write(event.model_dump_json() + "\n")
        self._events.flush()

    def stop_reason(self) -> StopReason | None:
        """Why to stop, if this rank was told."""
        return self._stop.reason()

    def at(self, phase: Phase, step: int) -> None:
        """Enter a phase."""
        self._heartbeat.beat(phase, step)
