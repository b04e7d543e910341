"""A storage folder with an empty registry."""

import shutil

import pytest

from orchestrator.registry.mlflow_client import open_client
from trainers.storage import Folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A registry that was opened once: creating the tables takes a second, copying them none."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def storage(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Folder(str(tmp_path))
