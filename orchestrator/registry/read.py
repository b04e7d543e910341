"""Reading the model registry: models, versions, the champion. Writes nothing and creates nothing.

Importing MLflow takes 2 s of CPU, so an SQLite registry is read from its tables; a tracking server, and a database
whose tables have another form, through MLflow's client. Both give the same `StoredModel`s.
"""

import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.registry import mlflow_client
from orchestrator.registry.mlflow_client import explain_failures, is_empty, registry_uri, sqlite_path
from orchestrator.registry.promotion import RowScores
from trainers.checkpoint.records import FileRecord
from trainers.credentials import hide_credentials
from trainers.errors import EvaluationError, JobError
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.row_scores import read_row_scores
from trainers.storage import Folder

CHAMPION = "champion"
RUN_STEP = "tuneyard.run_step"
"""Run and step of a version: by this tag a rerun finds the version that an earlier call registered."""
RECORD = "tuneyard.version"
"""The tag that holds a `Registered` as JSON."""
DECISION = "tuneyard.decision"
"""Why it is champion or not; another than at its registration where another run was quicker."""
SETTLED = "tuneyard.settled"
"""Set once the alias was given or withheld, as decided."""
COLLECTED = "tuneyard.collected"
"""Tag of a version whose files are gone: deleted by `collect`, or replaced by those of the same run, trained anew."""


class Registered(Record):
    """What was recorded of a version when it was registered."""

    run: str
    """The run folder."""
    step: int
    task: str
    metric: str
    """The metric that chose the checkpoint."""
    metrics: dict[str, float]
    notes: dict[str, str]
    """What makes a metric comparable, such as sacreBLEU's signature, by its name."""
    eval_key: str
    """Key of the evaluation shards."""
    computed_on: str = ""
    """Kind of device and version of torch that the metrics come from, where they are known."""
    promoted: bool
    """Whether it was decided that it becomes champion."""
    decision: str
    """Why it was, or was not."""
    files: dict[str, FileRecord]
    """Size and digest of each file of the model folder."""
    lineage: dict[str, str]


class ModelVersion(Registered):
    """One version of a model, as the registry tells it."""

    model: str
    version: int
    champion: bool
    """Whether this version holds the alias champion."""
    settled: bool
    """Whether its registration is complete."""
    source: str
    """The Hugging Face folder."""
    created: str
    """ISO 8601, UTC."""


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


@dataclass(frozen=True)
class StoredVersion:
    """One version, by anybody, as MLflow keeps it."""

    number: int
    source: str
    created_ms: int
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredModel:
    """One model as MLflow keeps it."""

    name: str
    updated_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    versions: dict[int, StoredVersion] = field(default_factory=dict)

    def ours(self) -> list[ModelVersion]:
        """The versions that this program registered, newest first."""
        stored = [self.versions[number] for number in sorted(self.versions, reverse=True)]
        return [self._version(version) for version in stored if RUN_STEP in version.tags]

    def _version(self, stored: StoredVersion) -> ModelVersion:
        if RECORD not in stored.tags:
            raise EvaluationError(
                f"version {stored.number} of {self.name} was registered by an earlier version of this program and "
                "cannot be read; delete it in MLflow, or name another registry.model"
            )
        record = Registered.model_validate_json(stored.tags[RECORD]).model_dump()
        return ModelVersion(
            **record | {"decision": stored.tags.get(DECISION, record["decision"])},
            model=self.name,
            version=stored.number,
            champion=self.aliases.get(CHAMPION) == stored.number,
            settled=stored.tags.get(SETTLED) == "true",
            source=stored.source,
            created=_iso(stored.created_ms),
        )


def list_models(uri: str) -> list[RegisteredModel]:
    """Every model of the registry, by name. Raises EvaluationError where it does not answer."""
    return [_summary(model) for model in sorted(read_models(uri), key=lambda model: model.name)]


def find_model(uri: str, name: str) -> StoredModel:
    """One model. Raises JobError for an unknown name."""
    models = {model.name: model for model in read_models(uri)}
    if not models:
        raise JobError(f"the registry {hide_credentials(uri)} is empty: no run has registered a model there")
    if name not in models:
        raise JobError(f"no model {name!r} in {hide_credentials(uri)}; known: {', '.join(sorted(models))}")
    return models[name]


def show_model(uri: str, name: str) -> list[ModelVersion]:
    """Every version of a model, newest first. Raises JobError for an unknown name."""
    return find_model(uri, name).ours()


def champion(uri: str, name: str) -> ModelVersion | None:
    """The version that holds the alias champion, if there is one and it was registered by this program."""
    return next((version for version in _versions(uri, name) if version.champion), None)


def find_version(uri: str, name: str, run_step: str, files: Mapping[str, FileRecord]) -> ModelVersion | None:
    """The version that was registered for a run's step with these very files: a run that was trained anew has others
    at the same step."""
    found = (one for one in _versions(uri, name) if f"{Folder(one.run).name}/{one.step}" == run_step)
    return next((one for one in found if one.files == files), None)


def named_folders(uri: str) -> dict[str, list[tuple[str, StoredVersion]]]:
    """The folders whose files a version of any model needs, spelled as `place_of` does, with these models and versions;
    those whose files are gone need none."""
    named = defaultdict(list)
    for model in read_models(uri):
        for version in model.versions.values():
            if COLLECTED not in version.tags:
                named[place_of(version.source)].append((model.name, version))
    return dict(named)


def is_registered(job: Job, folder: Folder) -> bool:
    """Whether a version of any model in the job's registry needs the files of a folder."""
    return place_of(str(folder)) in named_folders(registry_uri(job.storage, job.registry.uri))


def place_of(source: str) -> str:
    """One spelling for a folder that has several."""
    folder = Folder(source)
    return os.path.realpath(folder.path) if folder.is_local else source


def champion_number(uri: str, name: str) -> int | None:
    """Number of the version that holds the alias, whoever registered it; None if there is none."""
    return next((model.aliases.get(CHAMPION) for model in read_models(uri) if model.name == name), None)


def row_scores_of(version: ModelVersion) -> RowScores:
    """The evaluation rows of a version, without numbers where its run folder does not hold them any more."""
    try:
        numbers = read_row_scores(Folder(version.run), version.step)
    except EvaluationError:
        numbers = {}
    return RowScores(f"version {version.version}", version.eval_key, numbers)


def read_models(uri: str) -> list[StoredModel]:
    """All models with all versions; none where an SQLite registry does not exist yet."""
    if is_empty(uri):
        return []
    with explain_failures(uri):
        path = sqlite_path(uri)
        try:
            return _from_tables(path) if path else _from_client(uri)
        except sqlite3.OperationalError:  # tables of another form, or locked for long: MLflow knows
            return _from_client(uri)


def _from_tables(path: Path) -> list[StoredModel]:
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        models = {
            name: StoredModel(name, updated)
            for name, updated in database.execute("SELECT name, last_updated_time FROM registered_models")
        }
        for name, key, value in database.execute("SELECT name, key, value FROM registered_model_tags"):
            models[name].tags[key] = value
        for name, alias, number in database.execute("SELECT name, alias, version FROM registered_model_aliases"):
            models[name].aliases[alias] = int(number)
        for name, number, source, created in database.execute(
            "SELECT name, version, source, creation_time FROM model_versions "
            "WHERE current_stage IS NULL OR current_stage != 'Deleted_Internal'"
        ):
            models[name].versions[number] = StoredVersion(number, source, created)
        for name, number, key, value in database.execute("SELECT name, version, key, value FROM model_version_tags"):
            if number in models[name].versions:
                models[name].versions[number].tags[key] = value
    return list(models.values())


def _from_client(uri: str) -> list[StoredModel]:
    client = mlflow_client.open_client(uri)
    models = []
    for model in _pages(client.search_registered_models):
        quote_mark = '"' if "'" in model.name else "'"  # as MLflow's filters take a name
        versions = _pages(client.search_model_versions, f"name = {quote_mark}{model.name}{quote_mark}")
        stored = {
            int(one.version): StoredVersion(int(one.version), one.source, one.creation_timestamp, dict(one.tags))
            for one in versions
        }
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        models.append(StoredModel(model.name, model.last_updated_timestamp, dict(model.tags), aliases, stored))
    return models


def _pages(search: Callable[..., Any], filter_string: str | None = None) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _versions(uri: str, name: str) -> list[ModelVersion]:
    return next((model.ours() for model in read_models(uri) if model.name == name), [])


def _summary(model: StoredModel) -> RegisteredModel:
    standing = next((version for version in model.ours() if version.champion), None)
    return RegisteredModel(
        model=model.name,
        versions=len(model.versions),
        champion=model.aliases.get(CHAMPION),
        metric=standing.metric if standing else None,
        value=standing.metrics.get(standing.metric) if standing else None,
        updated=_iso(model.updated_ms),
    )


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
