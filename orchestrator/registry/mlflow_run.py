"""The MLflow run of a training run: one a run folder, opened at the start, completed whenever somebody sends.

What was sent stands in the run folder as the length of events.jsonl up to there. Points carry their events' own time
and MLflow keeps equal points once, so sending again after a kill changes nothing. Two processes may send: the one
beside the driver, and the driver as it registers; a lock lets one at a time.
"""

import getpass
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.registry.mlflow_client import error_code
from trainers.credentials import hide_credentials
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.events import EVENTS, EvaluationEvent, Event, parse_events, read_events
from trainers.run.folder import evaluation_event, read_evaluations
from trainers.run.lock import hold
from trainers.run.scalars import scalars_of
from trainers.shards.manifest import ShardManifest, Shards
from trainers.storage import Folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

RUN = "tuneyard.run"
"""Tag that holds a run folder's name: by it the run is found again."""
SENT = "mlflow.json"
MOST_METRICS, MOST_PARAMS = 1000, 100
"""In one call, as MLflow allows."""
PIECE_BYTES = 1 << 22


class Sent(Record):
    """What an MLflow run has of a run folder: mlflow.json."""

    run_id: str
    bytes: int
    """Of events.jsonl."""


class MlflowRun:
    """The MLflow run of one run folder.

    Args:
        client: of the registry; its own errors come through.
        shards: where they are known, the run gets its data sets.
    """

    def __init__(self, client: "MlflowClient", job: Job, folder: Folder, shards: Shards | None = None) -> None:
        self.client, self._job, self._folder, self._shards = client, job, folder, shards
        self.id = ""

    def send(self, complete: bool = False) -> str:
        """Open the run where it is not open, and send what is new. Returns its id.

        Args:
            complete: also evaluations of which the log does not tell; for a training that is over.
        """
        with self._alone():
            if not self.id:
                self._open()
            known = read_sent(self._folder)
            at = known.bytes if known and known.run_id == self.id else 0
            while piece := read_lines(self._folder, at):
                self.log([metric for event in parse_events(piece.splitlines()) for metric in _points(event)])
                at += len(piece)
                self._folder.write_bytes(SENT, Sent(run_id=self.id, bytes=at).model_dump_json().encode())
            if complete:
                self._send_untold()
        return self.id

    def log(self, metrics: Sequence["Metric"]) -> None:
        """Send points."""
        for batch in _batches(metrics, MOST_METRICS):
            self.client.log_batch(self.id, metrics=batch)

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED, KILLED, or SCHEDULED for a run that waits for its next leg."""
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(self.id, status)
        else:
            self.client.set_terminated(self.id, status)

    def _open(self) -> None:
        from mlflow.entities import Param

        experiment = experiment_of(self.client, self._job)
        found = self.client.search_runs([experiment], f"tags.`{RUN}` = '{self._folder.name}'", max_results=1)
        note = f"Task {self._job.task} on {self._job.model.path}; run folder {self._folder}. Its report is an artifact."
        tags = {RUN: self._folder.name, "mlflow.source.name": "tuneyard", "mlflow.user": _user(),
                "mlflow.note.content": hide_credentials(note)}  # fmt: skip
        run = found[0] if found else self.client.create_run(experiment, tags=tags, run_name=self._folder.name)
        self.id = str(run.info.run_id)
        params = [Param(key, value) for key, value in parameters(self._job).items() if key not in run.data.params]
        for batch in _batches(params, MOST_PARAMS):
            self.client.log_batch(self.id, params=batch)
        if self._shards and not run.inputs.dataset_inputs:
            self.client.log_inputs(self.id, _data_sets(self._job, self._shards))

    def _send_untold(self) -> None:
        told = {event.step for event in read_events(self._folder) if isinstance(event, EvaluationEvent)}
        untold = [record for record in read_evaluations(self._folder) if record.step not in told]
        began = self.client.get_run(self.id).info.start_time / 1000  # the same at each call
        events = [evaluation_event(record).model_copy(update={"time": began}) for record in untold]
        self.log([metric for event in events for metric in _points(event)])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder.path / "mlflow.lock").open("w") as lock:
            hold(lock, self._folder, wait=True)
            yield


def experiment_of(client: "MlflowClient", job: Job) -> str:
    """The experiment named like the registered model; made where there is none."""
    from mlflow.entities import ExperimentTag
    from mlflow.exceptions import MlflowException

    name = job.registry.model or job.name
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    artifacts = None if job.registry.uri else str(Folder(job.storage).path / "mlartifacts")
    kind = ExperimentTag("mlflow.experimentKind", "custom_model_development")  # else its page opens as for GenAI
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags={kind.key: kind.value}))
    except MlflowException as error:
        again = client.get_experiment_by_name(name)  # another driver was quicker
        if error_code(error) != "RESOURCE_ALREADY_EXISTS" or again is None:
            raise
        return str(again.experiment_id)


def parameters(job: Job) -> dict[str, str]:
    """The job as `section.key`: value."""
    flat: dict[str, str] = {}
    for section, value in job.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": _text(one) for key, one in value.items()})
        else:
            flat[section] = _text(value)
    return flat


def read_sent(folder: Folder) -> Sent | None:
    """What is known to have been sent."""
    try:
        return Sent.model_validate_json(folder.read_bytes(SENT))
    except (FileNotFoundError, ValueError):
        return None


def read_lines(folder: Folder, start: int) -> bytes:
    """Whole lines of events.jsonl from a byte on, a piece of them; empty where there is none yet."""
    try:
        with (folder.path / EVENTS).open("rb") as stream:
            stream.seek(start)
            piece = stream.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""
    return piece[: piece.rfind(b"\n") + 1]


def _points(event: Event) -> Iterator["Metric"]:
    from mlflow.entities import Metric

    for name, value in scalars_of(event).items():
        yield Metric(metric_name(name), value, int(event.time * 1000), getattr(event, "step", 0))


def metric_name(name: str) -> str:
    """A name that MLflow takes: labels of the data may hold any character."""
    return re.sub(r"[^\w .\-/]", "_", name)[:250]


def _user() -> str:
    """Who runs it, as MLflow shows it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return str(os.getuid())


def _text(value: Any) -> str:
    return hide_credentials(value if isinstance(value, str) else json.dumps(value))


def _data_sets(job: Job, shards: Shards) -> list["DatasetInput"]:
    splits = (("training", shards.train, job.data.train_paths), ("evaluation", shards.eval, job.data.eval_paths))
    return [_data_set(use, manifest, paths or job.data.train_paths) for use, manifest, paths in splits]


def _data_set(use: str, manifest: ShardManifest, paths: Sequence[str]) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    totals = {"num_rows": manifest.rows_in, **{name: manifest.total(name) for name in ("rows", "tokens", "targets")}}
    name = hide_credentials(paths[0].rstrip("/").rpartition("/")[2] or paths[0])
    source = json.dumps({"uri": hide_credentials(paths[0]), "paths": [hide_credentials(path) for path in paths]})
    dataset = Dataset(name[:500], manifest.key[:36], "local", source, profile=json.dumps(totals))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", use)])


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
