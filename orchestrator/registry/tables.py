"""Writing a tag or an alias. MLflow takes 2 s of CPU to import, so SQLite is written to by one statement each,
a tracking server through MLflow's client. Begin at `open_writer`.

Only tables of the form that `SCHEMA` names are written to, of which a test shows that all rows are then as MLflow's
client leaves them; any other goes to the client.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Union
from urllib.parse import quote

from orchestrator.registry import mlflow_client
from orchestrator.registry.mlflow_client import sqlite_path
from trainers.errors import JobError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMA = "dc11669786a5"
"""What MLflow's migrations call the form of its tables, in `alembic_version`: that of MLflow 3.17."""
WAIT_S = 20.0
"""For another process's transaction, as MLflow waits."""

Writer = Union["MlflowClient", "Tables"]


class Tables:
    """The calls of `MlflowClient` that set a tag or an alias, inside one transaction. Like those they change no time of
    last update. Raises JobError for a model or a version that is not there."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._put(
            "INSERT INTO registered_model_tags (workspace, name, key, value) "
            "SELECT workspace, name, :key, :value FROM registered_models WHERE name = :name "
            "ON CONFLICT (workspace, key, name) DO UPDATE SET value = excluded.value",
            {"name": name, "key": key, "value": value},
        )

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self._put(
            "INSERT INTO model_version_tags (workspace, name, version, key, value) "
            "SELECT workspace, name, version, :key, :value FROM model_versions "
            "WHERE name = :name AND version = :version AND current_stage != 'Deleted_Internal' "
            "ON CONFLICT (workspace, key, name, version) DO UPDATE SET value = excluded.value",
            {"name": name, "version": int(version), "key": key, "value": value},
        )

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._put(
            "INSERT INTO registered_model_aliases (workspace, name, alias, version) "
            "SELECT workspace, name, :alias, version FROM model_versions "
            "WHERE name = :name AND version = :version AND current_stage != 'Deleted_Internal' "
            "ON CONFLICT (workspace, name, alias) DO UPDATE SET version = excluded.version",
            {"name": name, "version": int(version), "alias": alias},
        )

    def _put(self, statement: str, values: dict[str, str | int]) -> None:
        if self._database.execute(statement, values).rowcount != 1:
            version = f" version {values['version']}" if "version" in values else ""
            raise JobError(f"the registry has no {values['name']}{version} any more")


@contextmanager
def open_writer(uri: str) -> Iterator[Writer]:
    """What sets tags and aliases of a registry; of SQLite all of them at the end, or none."""
    path = sqlite_path(uri)
    if path:
        with closing(_connect(path)) as database:
            if _is_known(database):
                with database:
                    yield Tables(database)
                return
    yield mlflow_client.open_client(uri)


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that holds the database for writing."""
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", WAIT_S, isolation_level=None, uri=True)
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("BEGIN IMMEDIATE")
    return database


def _is_known(database: sqlite3.Connection) -> bool:
    """Whether the tables are as they were tested; models outside MLflow's default workspace were not."""
    try:
        forms = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:
        return False
    elsewhere = "SELECT 1 FROM registered_models WHERE workspace != 'default'"
    return forms == [(SCHEMA,)] and database.execute(elsewhere).fetchone() is None
