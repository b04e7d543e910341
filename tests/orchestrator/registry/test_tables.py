"""Tags and aliases of an SQLite registry, written without MLflow: every row as MLflow leaves it, all or none."""

import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing

import pytest

from orchestrator.registry import mlflow_client, tables
from orchestrator.registry.manage import CHAMPIONS, collect, pick_version, promote, rollback
from orchestrator.registry.read import _from_client, champion, find_model
from orchestrator.registry.tables import Tables, open_writer
from tests.orchestrator.registry.test_registry import NO, YES, enter, uri_of
from tests.ranks import rank_context
from trainers.errors import JobError
from trainers.storage import Folder


@pytest.fixture
def versions(storage):
    """Versions 1 to 3, the first champion."""
    for decision, step in ((YES, 10), (NO, 20), (NO, 30)):
        enter(storage, decision, step=step)
    return storage


def rows_of(storage):
    """Every row of every table."""
    with closing(sqlite3.connect(storage.path / "mlflow.db")) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(map(repr, database.execute(f"SELECT * FROM {name}"))) for name in names}


def promote_by_number(uri, number):
    promote(uri, pick_version(uri, "topics", str(number)))


ACTS = {
    "promote": lambda uri: promote_by_number(uri, 2),
    "promote another": lambda uri: promote_by_number(uri, 3),
    "rollback": lambda uri: rollback(uri, "topics"),
    "promote again": lambda uri: promote_by_number(uri, 3),
    "collect": lambda uri: collect(uri, "topics", keep=0, delete=True),
}


def test_after_each_act_all_rows_are_as_mlflows_client_leaves_them(versions, tmp_path, monkeypatch):
    other, moved = Folder(str(tmp_path / "other")), []
    other.path.mkdir()
    shutil.copy(versions.path / "mlflow.db", other.path)
    delete = Folder.delete
    monkeypatch.setattr(Folder, "delete", lambda folder: moved.append(folder))  # both collect the same folders
    for name, act in ACTS.items():
        before = rows_of(versions)
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_client, "open_client", None)
            act(uri_of(versions))
        with monkeypatch.context() as patch:
            patch.setattr(tables, "SCHEMA", "another")
            act(uri_of(other))
        assert rows_of(versions) == rows_of(other) != before, name
        assert _from_client(uri_of(versions)) == _from_client(uri_of(other)), name
    assert len(moved) == 2 * 1 and moved[0] == moved[1]
    delete(moved[0])


def killed_at(statement, uri, act):
    """Do it in a process that is killed as it begins so many statements after it has locked the database."""
    left, connect = [statement], tables._connect

    def connect_and_count(path):
        database = connect(path)
        database.set_trace_callback(lambda _: count())
        return database

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    tables._connect = connect_and_count
    ACTS[act](uri)


@pytest.mark.parametrize("act, before, after", [("promote", 1, 2), ("rollback", 3, 2)])
def test_killed_at_any_statement_nothing_is_written_and_the_same_command_goes_on(versions, act, before, after):
    if act == "rollback":
        ACTS["promote"](uri_of(versions))
        ACTS["promote another"](uri_of(versions))
    untouched, killed = rows_of(versions), 0
    while True:
        process = rank_context().Process(target=killed_at, args=(killed + 1, uri_of(versions), act))
        process.start()
        process.join(400)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert rows_of(versions) == untouched and champion(uri_of(versions), "topics").version == before
        killed += 1
    assert killed == 5  # two looks at the form of the tables, tag, alias, commit
    assert champion(uri_of(versions), "topics").version == after
    assert json.loads(find_model(uri_of(versions), "topics").tags[CHAMPIONS])[-1] == after


def test_of_a_version_that_was_deleted_meanwhile_nothing_is_written(versions):
    mlflow_client.open_client(uri_of(versions)).delete_model_version("topics", "2")
    before = rows_of(versions)
    for call in (
        lambda registry: registry.set_registered_model_alias("topics", "champion", "2"),
        lambda registry: registry.set_model_version_tag("topics", "2", "key", "value"),
        lambda registry: registry.set_registered_model_tag("topic", "key", "value"),
    ):
        with pytest.raises(JobError, match="the registry has no topic"), open_writer(uri_of(versions)) as registry:
            registry.set_registered_model_tag("topics", "other", "value")
            call(registry)
    assert rows_of(versions) == before


def test_models_of_another_workspace_are_left_to_mlflow(versions):
    with closing(sqlite3.connect(versions.path / "mlflow.db")) as database, database:
        database.execute("INSERT INTO registered_models (workspace, name) VALUES ('theirs', 'films')")
    with open_writer(uri_of(versions)) as registry:
        assert not isinstance(registry, Tables)
