"""The model registry: one version a run's best checkpoint, found again by name, never registered twice.

Owns what is written to MLflow and in which order. Each step first looks for what an earlier, killed call left behind;
the version is found by its tag `tuneyard.run_step`, and what was decided at its creation stays decided.
`read.py` reads, `promotion.py` decides.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.registry import mlflow_client
from orchestrator.registry.digests import list_files
from orchestrator.registry.manage import crown
from orchestrator.registry.mlflow_client import error_code, explain_failures, registry_uri
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.read import (
    CHAMPION,
    RECORD,
    RUN_STEP,
    SETTLED,
    ModelVersion,
    Registered,
    champion_number,
    find_model,
    find_version,
)
from trainers.credentials import hide_credentials
from trainers.job.schema import Job
from trainers.run.events import StepEvent, read_events, steps_of
from trainers.run.folder import Evaluation, RegisteredVersion, parse_step
from trainers.storage import Folder
from trainers.tasks import load_task

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

POINTS_PER_CURVE = 500
"""Training curves are thinned to this many points for the registry; TensorBoard holds them whole."""


def register(
    job: Job, run: Folder, best: Evaluation, source: Folder, lineage: Mapping[str, str], decision: Promotion
) -> RegisteredVersion:
    """Register the best checkpoint of a run, or find the version that an earlier call registered.

    Args:
        job: the job; `registry` names the model and the server.
        run: the run folder, whose evaluations and events are copied as curves.
        best: evaluation of the checkpoint that is registered.
        source: the exported Hugging Face folder.
        lineage: where the model comes from, as `lineage.lineage` gives it.
        decision: whether the version becomes champion; kept from the first call where there was one.

    Raises:
        EvaluationError: where the registry refuses or does not answer.
        JobError: where storage is remote and no server is named.
    """
    uri = registry_uri(job.storage, job.registry.uri)
    name, run_step = job.registry.model or job.name, f"{run.name}/{best.step}"
    with explain_failures(uri):
        client = mlflow_client.open_client(uri)
        _create_model(client, name)
        version = find_version(uri, name, run_step)
        if version is None:
            tags = _tags(_record(job, run, best, source, lineage, decision), run_step)
            run_id = _log_run(client, job, run, best, name, tags)
            location = _publish(client, uri, run_id, source)
            client.create_model_version(name, location, run_id=run_id, tags=tags)
            version = find_version(uri, name, run_step)
            assert version is not None
        return _finish(client, uri, version)


def _create_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def _record(
    job: Job, run: Folder, best: Evaluation, source: Folder, lineage: Mapping[str, str], decision: Promotion
) -> Registered:
    return Registered(
        run=str(run),
        step=best.step,
        task=job.task,
        metric=job.evaluate.metric or load_task(job.task).metric,
        metrics=best.metrics,
        notes=best.notes,
        eval_key=best.eval_key,
        promoted=decision.promote,
        decision=decision.reason,
        files=list_files(source),
        lineage=dict(lineage),
    )


def _tags(record: Registered, run_step: str) -> dict[str, str]:
    """The record as JSON, and beside it what people search for."""
    tags = {
        RUN_STEP: run_step,
        RECORD: record.model_dump_json(),
        "tuneyard.task": record.task,
        "tuneyard.metric": record.metric,
        "tuneyard.value": str(record.metrics.get(record.metric)),
        "tuneyard.decision": record.decision,
    }
    return {name: hide_credentials(value) for name, value in tags.items()}


def _log_run(
    client: "MlflowClient", job: Job, run: Folder, best: Evaluation, name: str, tags: Mapping[str, str]
) -> str:
    """The MLflow run with parameters and curves, so that `mlflow ui` shows them; completed where it was cut short."""
    from mlflow.entities import Param, RunTag

    mlflow_run = _find_run(client, _experiment(client, job, name), tags[RUN_STEP], f"{run.name} step {best.step}")
    run_id = str(mlflow_run.info.run_id)
    short = [RunTag(key, value) for key, value in tags.items() if key != RECORD]
    params = [Param(key, value) for key, value in _parameters(job).items() if key not in mlflow_run.data.params]
    client.log_batch(run_id, tags=short)
    for batch in _batches(params, 100):
        client.log_batch(run_id, params=batch)
    for batch in _batches(list(_curves(run, best, mlflow_run.info.start_time)), 1000):
        client.log_batch(run_id, metrics=batch)
    client.set_terminated(run_id)
    return run_id


def _experiment(client: "MlflowClient", job: Job, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    artifacts = None if job.registry.uri else str(Folder(job.storage).path / "mlartifacts")
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        again = client.get_experiment_by_name(name)  # another driver was quicker
        if error_code(error) != "RESOURCE_ALREADY_EXISTS" or again is None:
            raise
        return str(again.experiment_id)


def _find_run(client: "MlflowClient", experiment: str, run_step: str, title: str) -> Any:
    found = client.search_runs([experiment], f"tags.`{RUN_STEP}` = '{run_step}'", max_results=1)
    return found[0] if found else client.create_run(experiment, tags={RUN_STEP: run_step}, run_name=title)


def _parameters(job: Job) -> dict[str, str]:
    """The job as `section.key`: value."""
    flat: dict[str, str] = {}
    for section, value in job.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": _text(one) for key, one in value.items()})
        else:
            flat[section] = _text(value)
    return flat


def _text(value: Any) -> str:
    return hide_credentials(value if isinstance(value, str) else json.dumps(value))


def _curves(run: Folder, best: Evaluation, time_ms: int) -> Iterator["Metric"]:
    """Evaluation metrics by step, the best one's last, and the training curves.

    All points carry the MLflow run's own start time, so that logging them twice changes nothing.
    """
    from mlflow.entities import Metric

    steps = [step for name in (run / "evals").list() if name.endswith(".json") and (step := parse_step(name))]
    for step in steps:
        evaluation = Evaluation.model_validate_json((run / "evals").read_bytes(f"step-{step:08d}.json"))
        for name, value in evaluation.metrics.items():
            yield Metric(_metric_name(f"eval/{name}"), value, time_ms, step)
    for name, value in best.metrics.items():
        yield Metric(_metric_name(f"best/{name}"), value, time_ms, best.step)
    for event in _thinned(steps_of(read_events(run))):
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s"):
            value = getattr(event, name)
            if value is not None:
                yield Metric(f"train/{name}", float(value), time_ms, event.step)


def _metric_name(name: str) -> str:
    """A name that MLflow takes: labels of the data may hold any character."""
    return re.sub(r"[^\w .\-/]", "_", name)


def _thinned(events: list[StepEvent]) -> list[StepEvent]:
    stride = -(-len(events) // POINTS_PER_CURVE) or 1
    return events[::stride]


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _publish(client: "MlflowClient", uri: str, run_id: str, source: Folder) -> str:
    """Where the version's files are: the export itself, or a copy of it, for a tracking server takes no local paths."""
    if mlflow_client.sqlite_path(uri) or not source.is_local:
        return hide_credentials(str(source))
    client.log_artifacts(run_id, str(source.path), "model")
    return f"{client.get_run(run_id).info.artifact_uri}/model"


def _finish(client: "MlflowClient", uri: str, version: ModelVersion) -> RegisteredVersion:
    """Give the alias that was decided, once: a rerun must not undo what a newer version or a person did since."""
    standing = champion_number(uri, version.model)
    if not version.settled:
        if version.promoted and (standing is None or standing < version.version):
            crown(client, find_model(uri, version.model), version.version)
            standing = version.version
        client.set_model_version_tag(version.model, str(version.version), SETTLED, "true")
    return RegisteredVersion(
        model=version.model,
        version=version.version,
        alias=CHAMPION if standing == version.version else None,
        step=version.step,
        source=version.source,
        decision=version.decision,
    )
