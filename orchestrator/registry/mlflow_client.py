"""The door to MLflow: which registry a job means, a quiet client for it, and its failures as ours.

Knows nothing of jobs, runs or versions. Importing MLflow takes 2 s of CPU, so that happens inside `open_client`.
"""

import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from trainers.credentials import hide_credentials, put_back, take_out
from trainers.errors import EvaluationError, JobError
from trainers.storage import is_remote

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"


def registry_uri(storage: str, uri: str | None = None) -> str:
    """The tracking URI of a registry: the server that is named, else SQLite under storage.

    Raises:
        JobError: where storage is a bucket and no server is named.
    """
    if uri:
        return str(take_out(uri))
    if is_remote(storage):
        raise JobError(
            f"registry.uri: storage {hide_credentials(storage)!r} is remote, where SQLite cannot live; "
            "name an MLflow tracking server, e.g. registry.uri: http://mlflow.example:5000"
        )
    path = Path(storage.removeprefix("file://")).absolute() / DATABASE
    return "sqlite:///" + re.sub("[?#%]", lambda found: quote(found[0]), str(path))  # as SQLAlchemy reads it


def sqlite_path(uri: str) -> Path | None:
    """The database file of an SQLite URI, None for a server."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def is_empty(uri: str) -> bool:
    """True for an SQLite registry that nothing was written to yet; looking must not create it."""
    path = sqlite_path(uri)
    return path is not None and not path.exists()


def open_client(uri: str) -> "MlflowClient":
    """A client whose tracking store and registry are `uri`; creates an SQLite database where there is none."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 7 take minutes to say that nobody answers
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = put_back(uri)
    if whole.startswith("http"):  # MLflow prints its URI, and takes these from the environment
        user, _, password = whole.partition("://")[2].rpartition("@")[0].partition(":")
        os.environ.update({"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password} if user else {})
        whole = uri
    return MlflowClient(tracking_uri=whole, registry_uri=whole)


@contextmanager
def explain_failures(uri: str) -> Iterator[None]:
    """Turn what MLflow and its database raise into one message. Raises EvaluationError."""
    try:
        yield
    except _failures() as error:
        cause = hide_credentials(str(error).splitlines()[0] if str(error) else type(error).__name__)
        remedy = (
            "check that the file is whole and may be written; the run itself is safe, run the same command again"
            if sqlite_path(uri)
            else "check registry.uri and that the server is up; the run itself is safe, run the same command again"
        )
        raise EvaluationError(f"the model registry {hide_credentials(uri)} refused: {cause[:500]}; {remedy}") from error


def _failures() -> tuple[type[Exception], ...]:
    """Evaluated once something was raised: MLflow is not imported for its exceptions alone."""
    if "mlflow" not in sys.modules:
        return (OSError, sqlite3.Error)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (OSError, sqlite3.Error, MlflowException, SQLAlchemyError)


def error_code(error: Exception) -> Any:
    """MLflow's name of an error, such as RESOURCE_ALREADY_EXISTS."""
    return getattr(error, "error_code", None)
