"""One message when a run is done, failed, preempted or killed, to the address that `notify` names."""

import json
import urllib.request
from typing import Any

from trainers.credentials import put_back, show_address
from trainers.errors import JobError
from trainers.run.folder import read_result
from trainers.run.record import Run

TIMEOUT_S = 10.0


class WebHook:
    """See `outlets.Outlet`."""

    name = "the web hook"

    def __init__(self, run: Run) -> None:
        self._run = run

    def send(self) -> None:
        """Nothing is sent before the end."""

    def close(self, status: str) -> None:
        """The message; a sweep's trials that wait or are trained have none."""
        if status in ("paused", "trained"):
            return
        address = show_address(self._run.job.notify or "")
        if address is None:
            raise JobError("notify: its address is hidden in a run folder's job.yaml; run the job file itself")
        request = urllib.request.Request(
            put_back(address), json.dumps(message(self._run, status)).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answer.read()


def message(run: Run, status: str) -> dict[str, Any]:
    """What is posted; `text` is what Slack, Mattermost and Teams show."""
    result = read_result(run.folder) if status != "killed" else None
    best = result.best if result else None
    told = f": {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    version = result.registry if result else None
    error = result.error if result else None
    return {
        "text": f"{run.folder.name} is {status}{told}" + (f": {error}" if error else ""),
        "run": run.folder.name,
        "job": run.job.name,
        "status": status,
        "folder": str(run.folder),
        "step": result.steps if result else None,
        "best": best,
        "registry": version.model_dump(mode="json") if version else None,
        "error": error,
    }
