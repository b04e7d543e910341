"""The model registry: one version a run's best checkpoint, found again by name, never registered twice.

Owns what is written to MLflow and in which order. Each step first looks for what an earlier, killed call left behind;
the version is found by its tag `tuneyard.run_step` and its files, and what was decided at its creation stays decided.
`read.py` reads, `promotion.py` decides.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import xxhash

from orchestrator.registry import mlflow_client
from orchestrator.registry.digests import list_files
from orchestrator.registry.manage import crown
from orchestrator.registry.mlflow_client import error_code, explain_failures, registry_uri
from orchestrator.registry.mlflow_run import MlflowRun, metric_name
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.read import (
    CHAMPION,
    COLLECTED,
    DECISION,
    RECORD,
    RUN_STEP,
    SETTLED,
    ModelVersion,
    Registered,
    champion_number,
    find_model,
    find_version,
    named_folders,
    place_of,
    read_models,
)
from trainers.checkpoint.records import FileRecord
from trainers.credentials import hide_credentials
from trainers.job.schema import Job
from trainers.run.folder import Evaluation, RegisteredVersion
from trainers.shards.manifest import Shards
from trainers.storage import Folder
from trainers.tasks import load_task

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGED_MODEL = "tuneyard.logged_model"
"""Tag that holds the id of MLflow's logged model of a version."""
FILES = "tuneyard.files"
"""Tag of a version and its logged model: a digest of the names and digests of its files."""


def register(
    job: Job,
    run: Folder,
    best: Evaluation,
    source: Folder,
    lineage: Mapping[str, str],
    decision: Promotion,
    shards: Shards | None = None,
) -> RegisteredVersion:
    """Register the best checkpoint of a run, or find the version that an earlier call registered.

    Args:
        job: the job; `registry` names the model and the server.
        run: the run folder, whose evaluations and events are copied as curves.
        best: evaluation of the checkpoint that is registered.
        source: the exported Hugging Face folder.
        lineage: where the model comes from, as `lineage.lineage` gives it.
        shards: the run's data sets in MLflow, where its run is not open yet.
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
        files = list_files(source)
        version = find_version(uri, name, run_step, files)
        if version is None:
            tags = _tags(_record(job, run, best, files, lineage, decision), run_step)
            mlflow_run = MlflowRun(client, job, run, shards)
            mlflow_run.send(complete=True)
            tags[LOGGED_MODEL] = _log_version(mlflow_run, best, tags)
            location = _publish(client, uri, mlflow_run.id, source)
            client.create_model_version(name, location, run_id=mlflow_run.id, tags=tags)
            version = find_version(uri, name, run_step, files)
            assert version is not None
        _mark_replaced(client, uri, version)
        return _finish(client, uri, version, decision.champion)


def _create_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def _record(
    job: Job,
    run: Folder,
    best: Evaluation,
    files: dict[str, FileRecord],
    lineage: Mapping[str, str],
    decision: Promotion,
) -> Registered:
    return Registered(
        run=str(run),
        step=best.step,
        task=job.task,
        metric=job.evaluate.metric or load_task(job.task).metric,
        metrics=best.metrics,
        notes=best.notes,
        eval_key=best.eval_key,
        computed_on=best.computed_on,
        promoted=decision.promote,
        decision=decision.reason,
        files=files,
        lineage=dict(lineage),
    )


def _tags(record: Registered, run_step: str) -> dict[str, str]:
    """The record as JSON, and beside it what people search for."""
    files = json.dumps(sorted((name, file.digest) for name, file in record.files.items()))
    tags = {
        RUN_STEP: run_step,
        RECORD: record.model_dump_json(),
        "tuneyard.task": record.task,
        "tuneyard.metric": record.metric,
        "tuneyard.value": str(record.metrics.get(record.metric)),
        DECISION: record.decision,
        FILES: xxhash.xxh3_64_hexdigest(files.encode()),
    }
    return {name: hide_credentials(value) for name, value in tags.items()}


def _log_version(run: MlflowRun, best: Evaluation, tags: Mapping[str, str]) -> str:
    """What the MLflow run says of the version, and its logged model, whose id is given back."""
    from mlflow.entities import LoggedModelOutput, Metric, RunTag

    client, of_run = run.client, run.client.get_run(run.id)
    client.log_batch(run.id, tags=[RunTag(key, value) for key, value in tags.items() if key != RECORD])
    wanted = f"source_run_id = '{run.id}'"
    known = client.search_logged_models([of_run.info.experiment_id], filter_string=wanted)
    mine = {name: tags[name] for name in (RUN_STEP, FILES)}
    models = [model for model in known if mine.items() <= model.tags.items()]
    model = models[0] if models else client.create_logged_model(
        of_run.info.experiment_id, f"step-{best.step:08d}", source_run_id=run.id, tags=mine
    )  # fmt: skip
    began = of_run.info.start_time  # the same at each call, so that points logged twice are one
    named = {metric_name(f"registered/{name}"): value for name, value in best.metrics.items() if "/" not in name}
    run.log([Metric(name, value, began, best.step, model_id=model.model_id) for name, value in named.items()])
    if model.model_id not in {output.model_id for output in of_run.outputs.model_outputs}:
        client.log_outputs(run.id, [LoggedModelOutput(model.model_id, best.step)])
    client.finalize_logged_model(model.model_id, "READY")
    run.set_status("FINISHED")
    return str(model.model_id)


def _publish(client: "MlflowClient", uri: str, run_id: str, source: Folder) -> str:
    """Where the version's files are: the export itself, or a copy of it, for a tracking server takes no local paths."""
    if mlflow_client.sqlite_path(uri) or not source.is_local:
        return hide_credentials(str(source))
    root, taken = client.get_run(run_id).info.artifact_uri, _sources(uri)
    names = ("model", *(f"model-{number}" for number in range(2, len(taken) + 2)))
    name = next(name for name in names if f"{root}/{name}" not in taken)  # the same run, trained anew, has versions
    client.log_artifacts(run_id, str(source.path), name)
    return f"{root}/{name}"


def _sources(uri: str) -> set[str]:
    return {version.source for model in read_models(uri) for version in model.versions.values()}


def _mark_replaced(client: "MlflowClient", uri: str, version: ModelVersion) -> None:
    """Versions that name the same folder with other files have lost theirs: their run was trained anew."""
    for model, other in named_folders(uri).get(place_of(version.source), ()):
        if RECORD in other.tags and Registered.model_validate_json(other.tags[RECORD]).files != version.files:
            client.set_model_version_tag(model, str(other.number), COLLECTED, "true")


def _finish(client: "MlflowClient", uri: str, version: ModelVersion, weighed: int | str | None) -> RegisteredVersion:
    """Give the alias that was decided, once: a rerun must not undo what a newer version or a person did since.

    A tracking server has no lock, so another run may have become champion since the decision; then this one waits for
    a person, or `tuneyard registry promote --if-better`, to weigh the two.
    """
    decision, standing = version.decision, champion_number(uri, version.model)
    if not version.settled:
        model = find_model(uri, version.model)
        if logged := model.versions[version.version].tags.get(LOGGED_MODEL):
            here = [{"name": version.model, "version": version.version}]
            client.set_logged_model_tags(
                logged, {"mlflow.modelVersions": json.dumps(here)}
            )  # its link in MLflow's pages
        if version.promoted and weighed != "any" and standing not in (weighed, version.version):
            decision = f"not promoted: version {standing} became champion while this one was weighed against another"
            client.set_model_version_tag(version.model, str(version.version), DECISION, decision)
        elif version.promoted and (standing is None or standing < version.version):
            crown(client, model, version.version)
            standing = champion_number(uri, version.model)  # of two at the same moment the later has it
        client.set_model_version_tag(version.model, str(version.version), SETTLED, "true")
    return RegisteredVersion(
        model=version.model,
        version=version.version,
        alias=CHAMPION if standing == version.version else None,
        step=version.step,
        source=version.source,
        decision=decision,
    )
