"""What follows a run, each in a thread: sends what is new every few seconds, and at the end how it ended.

An outlet that fails is said once on the terminal and tried again; what it missed stands in the run's log and is sent
when it answers.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Event as Flag
from threading import Thread
from typing import IO, Protocol

from orchestrator.tracking.mlflow_outlet import MlflowOutlet
from orchestrator.tracking.wandb_outlet import WandbOutlet
from orchestrator.tracking.web_hook import WebHook
from trainers.credentials import hide_credentials
from trainers.run.events import DoneEvent, read_events
from trainers.run.folder import read_result
from trainers.run.lock import hold
from trainers.run.record import Run

EVERY_S = 3.0
LAST_TRIES = 2
GOES_ON = ("preempted", "resize", "paused")
"""Reasons to stop after which a training is not over."""


class Outlet(Protocol):
    """One who follows."""

    name: str

    def send(self) -> None:
        """Send what is new; the first call opens. May raise anything."""
        ...

    def close(self, status: str) -> None:
        """Send how the run ended: done, failed, preempted, paused, trained or killed. May raise anything."""
        ...


def follow(run: Run, stdin: IO[bytes]) -> None:
    """Follow a run until stdin ends; its last word says how the driver ended."""
    with (run.folder.path / "tracking.lock").open("w") as lock:  # a killed driver's may still be at its end
        hold(lock, run.folder, wait=True)
        _follow(run, stdin)


def _follow(run: Run, stdin: IO[bytes]) -> None:
    over, last = Flag(), [""]
    outlets = _outlets(run)
    threads = [Thread(target=_attend, args=(outlet, over, lambda: _status(run, last[0]))) for outlet in outlets]
    for thread in threads:
        thread.start()
    last[0] = stdin.read().decode()
    over.set()
    for thread in threads:
        thread.join()


def _outlets(run: Run) -> list[Outlet]:
    job = run.job
    outlets: list[Outlet] = [MlflowOutlet(run)] if "mlflow" in job.report_to else []
    outlets += [WandbOutlet(run)] if "wandb" in job.report_to else []
    return outlets + ([WebHook(run)] if job.notify else [])


def _attend(outlet: Outlet, over: Flag, status: Callable[[], str]) -> None:
    """One outlet, from its opening to its end."""
    silent = False
    while True:
        ending = over.is_set()
        for left in range(LAST_TRIES if ending else 1, 0, -1):
            try:
                outlet.send()
                if ending:
                    outlet.close(status())
                if silent:
                    _say(f"{outlet.name} answers again and has what it missed")
                silent = False
                break
            except Exception as error:
                logging.getLogger(__name__).exception("%s", outlet.name)
                cause = hide_credentials(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")[:300]
                if not silent:
                    _say(
                        f"{outlet.name} does not take what it is sent ({cause}); the run goes on, and it is tried again"
                    )
                silent = True
                if ending and left == 1:
                    _say(f"{outlet.name} does not have the end of the run")
        if ending:
            return
        over.wait(EVERY_S)


def _say(line: str) -> None:
    with suppress(OSError):  # the driver is gone
        print(line, flush=True)


def _status(run: Run, word: str) -> str:
    """How the run ended: as result.json says, or as a leg of a sweep does, or with its driver."""
    if word == "ended" and (result := read_result(run.folder)):
        return result.status
    if word != "paused":
        return "killed"
    ends = [event.stopped for event in read_events(run.folder) if isinstance(event, DoneEvent)]
    return "trained" if ends and ends[-1] not in GOES_ON else "paused"
