"""Reading the model registry: models, versions, the champion. Writes nothing and creates nothing."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.registry import mlflow_client
from orchestrator.registry.mlflow_client import error_code, explain_failures, is_empty
from orchestrator.registry.promotion import RowScores
from trainers.errors import EvaluationError, JobError
from trainers.records import Record
from trainers.run.row_scores import read_row_scores
from trainers.storage import Folder, hide_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
RUN_STEP = "tuneyard.run_step"
SETTLED = "tuneyard.settled"
"""Set once the alias was given or withheld, as decided."""
LINEAGE = "tuneyard.lineage."


class ModelVersion(Record):
    """One version of a model, as the registry tells it."""

    model: str
    version: int
    champion: bool
    """Whether this version holds the alias champion."""
    promoted: bool
    """Whether it was decided at its registration that it becomes champion."""
    decision: str
    """Why it was, or was not."""
    settled: bool
    """Whether its registration is complete."""
    step: int
    metric: str
    """The metric that chose the checkpoint."""
    metrics: dict[str, float]
    eval_key: str
    """Key of the evaluation shards."""
    run: str
    """The run folder."""
    source: str
    """The Hugging Face folder."""
    created: str
    """ISO 8601, UTC."""
    lineage: dict[str, str]


class RegisteredModel(Record):
    """One model, as `tuneyard registry list` shows it."""

    model: str
    versions: int
    champion: int | None
    """Version that holds the alias champion."""
    metric: str | None
    """The champion's metric."""
    value: float | None
    """The champion's value of it."""
    updated: str
    """ISO 8601, UTC."""


def list_models(uri: str) -> list[RegisteredModel]:
    """Every model of the registry, by name. Raises EvaluationError where it does not answer."""
    if is_empty(uri):
        return []
    with explain_failures(uri):
        client = mlflow_client.open_client(uri)
        return sorted((_summary(client, model) for model in _models(client)), key=lambda one: one.model)


def show_model(uri: str, name: str) -> list[ModelVersion]:
    """Every version of a model, newest first. Raises JobError for an unknown name."""
    if is_empty(uri):
        raise JobError(f"the registry {hide_credentials(uri)} is empty: no run has registered a model there")
    with explain_failures(uri):
        client = mlflow_client.open_client(uri)
        known = [model.name for model in _models(client)]
        if name not in known:
            raise JobError(f"no model {name!r} in {hide_credentials(uri)}; known: {', '.join(sorted(known)) or 'none'}")
        standing = champion_version(client, name)
        found = _pages(client.search_model_versions, f"name = {_quoted(name)}")
        versions = [_version(one, standing) for one in found if RUN_STEP in one.tags]
        return sorted(versions, key=lambda one: -one.version)


def champion(uri: str, name: str) -> ModelVersion | None:
    """The version that holds the alias champion, if there is one and it was registered by this program."""
    if is_empty(uri):
        return None
    with explain_failures(uri):
        client = mlflow_client.open_client(uri)
        standing = champion_version(client, name)
        if standing is None:
            return None
        found = client.get_model_version(name, str(standing))
        return _version(found, standing) if RUN_STEP in found.tags else None


def row_scores_of(version: ModelVersion) -> RowScores:
    """The evaluation rows of a version, without numbers where its run folder does not hold them any more."""
    try:
        numbers = read_row_scores(Folder(version.run), version.step)
    except EvaluationError:
        numbers = {}
    return RowScores(f"version {version.version}", version.eval_key, numbers)


def find_version(client: "MlflowClient", name: str, run_step: str) -> ModelVersion | None:
    """The version that was registered for a run's step."""
    found = client.search_model_versions(f"name = {_quoted(name)} and tags.`{RUN_STEP}` = '{run_step}'")
    return _version(found[0], champion_version(client, name)) if found else None


def champion_version(client: "MlflowClient", name: str) -> int | None:
    """Number of the version that holds the alias, None where none does or the model does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        standing = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if standing is None else int(standing)


def _models(client: "MlflowClient") -> list[Any]:
    return list(_pages(client.search_registered_models, None))


def _pages(search: Any, filter_string: str | None) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _quoted(name: str) -> str:
    """A name as MLflow's filters take it."""
    quote = '"' if "'" in name else "'"
    return f"{quote}{name}{quote}"


def _summary(client: "MlflowClient", model: Any) -> RegisteredModel:
    standing = model.aliases.get(CHAMPION)
    version = _version(client.get_model_version(model.name, str(standing)), int(standing)) if standing else None
    count = sum(1 for _ in _pages(client.search_model_versions, f"name = {_quoted(model.name)}"))
    return RegisteredModel(
        model=model.name,
        versions=count,
        champion=int(standing) if standing else None,
        metric=version.metric if version else None,
        value=version.metrics.get(version.metric) if version else None,
        updated=_iso(model.last_updated_timestamp),
    )


def _version(found: Any, standing: int | None) -> ModelVersion:
    tags = found.tags
    return ModelVersion(
        model=found.name,
        version=int(found.version),
        champion=int(found.version) == standing,
        promoted=tags.get("tuneyard.promote") == "true",
        decision=tags.get("tuneyard.decision", ""),
        settled=tags.get(SETTLED) == "true",
        step=int(tags.get("tuneyard.step", 0)),
        metric=tags.get("tuneyard.metric", ""),
        metrics=json.loads(tags.get("tuneyard.metrics", "{}")),
        eval_key=tags.get("tuneyard.eval_key", ""),
        run=tags.get("tuneyard.run", ""),
        source=found.source,
        created=_iso(found.creation_timestamp),
        lineage={name.removeprefix(LINEAGE): text for name, text in sorted(tags.items()) if name.startswith(LINEAGE)},
    )


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
