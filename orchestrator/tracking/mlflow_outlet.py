"""A run in MLflow while it goes on: points by step, this machine's load, and at the end status, report and pictures."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.registry.manage import registry_lock
from orchestrator.registry.mlflow_client import open_client, registry_uri
from orchestrator.registry.mlflow_run import MlflowRun
from orchestrator.report.page import REPORT
from trainers.evaluation.confusion import draw_confusion
from trainers.run.folder import read_result
from trainers.run.record import Run

STATUS = {"done": "FINISHED", "trained": "FINISHED", "failed": "FAILED", "paused": "SCHEDULED"}
"""What MLflow calls it; KILLED otherwise."""
SYSTEM_EVERY_S = 10.0


class MlflowOutlet:
    """See `outlets.Outlet`."""

    name = "MLflow"

    def __init__(self, run: Run) -> None:
        self._run = run
        self._mlflow: MlflowRun | None = None
        self._began, self._monitored, self._running = time.time(), 0.0, False
        self._monitors: list[Any] = []

    def send(self) -> None:
        """Points of new events, and the load of the machine that the driver is on."""
        if self._mlflow is None:
            job = self._run.job
            uri = registry_uri(job.storage, job.registry.uri)
            with registry_lock(uri):  # of two that find no database one makes it
                client = open_client(uri)
                client.search_experiments(max_results=1)
            self._mlflow = MlflowRun(client, job, self._run.folder, self._run.shards)
            self._monitors = _monitors()
        self._mlflow.send()
        if not self._running:
            self._mlflow.set_status("RUNNING")
            self._running = True
        if time.time() - self._monitored >= SYSTEM_EVERY_S:
            self._monitored = time.time()
            self._mlflow.log(list(self._load()))

    def close(self, status: str) -> None:
        """Status, report and confusion matrix."""
        mlflow = self._mlflow
        assert mlflow is not None
        folder = self._run.folder.path
        if (folder / REPORT).exists():
            mlflow.client.log_artifact(mlflow.id, str(folder / REPORT))
        result = read_result(self._run.folder)
        step = result.best["step"] if result and result.best else None
        figure = draw_confusion(self._run.folder, step) if isinstance(step, int) else None
        if figure is not None:
            with tempfile.TemporaryDirectory() as place:
                picture = Path(place) / "confusion.png"
                figure.savefig(picture)
                mlflow.client.log_artifact(mlflow.id, str(picture))
        mlflow.set_status(STATUS.get(status, "KILLED"))

    def _load(self) -> Iterator[Any]:
        from mlflow.entities import Metric

        now = time.time()
        for monitor in self._monitors:
            monitor.collect_metrics()
            for name, value in monitor.aggregate_metrics().items():
                yield Metric(f"system/{name}", value, int(now * 1000), int(now - self._began))
            monitor.clear_metrics()


def _monitors() -> list[Any]:
    """MLflow's own; that of GPUs where there are some."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        return [*monitors, GPUMonitor()]
    except Exception:  # no pynvml, no driver, no GPU: it raises whatever comes
        return monitors
