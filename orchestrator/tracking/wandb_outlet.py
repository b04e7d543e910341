"""A run in Weights & Biases while it goes on; with WANDB_MODE=offline in the run folder's wandb/, for `wandb sync`."""

from importlib.util import find_spec
from typing import Any

from orchestrator.registry.mlflow_run import parameters, read_lines
from trainers.errors import JobError
from trainers.run.events import parse_events
from trainers.run.record import Run
from trainers.run.scalars import scalars_of

SENT = "wandb.sent"
"""Holds how much of events.jsonl was sent."""


def check_wandb() -> None:
    """Raises JobError where the package is missing."""
    if find_spec("wandb") is None:
        raise JobError("report_to: wandb is not installed; pip install 'tuneyard[wandb]', or leave it out")


class WandbOutlet:
    """See `outlets.Outlet`."""

    name = "Weights & Biases"

    def __init__(self, run: Run) -> None:
        self._run = run
        self._wandb: Any = None
        self._sent = 0

    def send(self) -> None:
        """Points of new events; the run goes on in W&B's run of the same id."""
        folder = self._run.folder
        if self._wandb is None:
            self._wandb = _open(self._run)
            self._sent = int(folder.read_bytes(SENT)) if folder.exists(SENT) else 0
        while piece := read_lines(folder, self._sent):
            for event in parse_events(piece.splitlines()):
                if values := scalars_of(event):
                    self._wandb.log({**values, "step": getattr(event, "step", 0)})
            self._sent += len(piece)
            folder.write_bytes(SENT, str(self._sent).encode())

    def close(self, status: str) -> None:
        """Status; W&B shows a run that failed or was killed as such."""
        self._wandb.summary["status"] = status
        self._wandb.finish(exit_code=0 if status in ("done", "trained", "paused") else 1)
        import wandb

        wandb.teardown()  # its service process too


def _open(run: Run) -> Any:
    import wandb

    quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True)
    name, job = run.folder.name, run.job
    opened = wandb.init(project=job.registry.model or job.name, id=name, name=name, resume="allow",
                        dir=str(run.folder.path), config=parameters(job), settings=quiet)  # fmt: skip
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")  # restarts repeat steps, evaluations end out of order
    return opened
