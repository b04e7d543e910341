"""The registry by hand: what is promoted, rolled back, verified and collected; the same after a kill at any point."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.registry import mlflow_client, tables
from orchestrator.registry.lineage import resolved_yaml
from orchestrator.registry.manage import CHAMPIONS, collect, pick_version, promote, rollback, verify_files
from orchestrator.registry.mlflow_client import open_client
from orchestrator.registry.read import champion, find_model
from tests.orchestrator.registry.test_registry import NO, YES, Killed, dying_after, enter, job_of, uri_of
from trainers.errors import JobError
from trainers.run.row_scores import write_row_scores
from trainers.storage import Folder


@pytest.fixture
def versions(storage):
    """Versions 1 and 2, the first champion."""
    lineage = {"seed": "11", "job": resolved_yaml(job_of(storage))}
    enter(storage, YES, step=10, lineage=lineage)
    enter(storage, NO, step=20, lineage=lineage)
    return storage


def standing(storage):
    return champion(uri_of(storage), "topics").version


def call(storage, *words):
    return CliRunner().invoke(app, ["registry", *words, "--storage", str(storage)])


def test_a_version_is_promoted_by_hand_and_rolled_back(versions):
    assert call(versions, "promote", "topics", "2").output == "topics version 2 is champion\n"
    assert standing(versions) == 2
    assert rollback(uri_of(versions), "topics") == 1 == standing(versions)
    with pytest.raises(JobError, match="no champion before version 1"):
        rollback(uri_of(versions), "topics")
    assert standing(versions) == 1


def test_an_alias_given_in_mlflow_is_where_a_rollback_starts(versions):
    promote(uri_of(versions), pick_version(uri_of(versions), "topics", "2"))
    open_client(uri_of(versions)).set_registered_model_alias("topics", "champion", "1")
    with pytest.raises(JobError, match="no champion before version 1"):
        rollback(uri_of(versions), "topics")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_promote_and_rollback_end_in_the_same_state(versions, tmp_path, monkeypatch, after):
    """By MLflow's client, as on a server; SQLite's one transaction is killed in test_tables.py."""
    monkeypatch.setattr(tables, "SCHEMA", "another")

    def promote_two(uri):
        promote(uri, pick_version(uri, "topics", "2"))

    for act, ends in ((promote_two, 2), (lambda uri: rollback(uri, "topics"), 1)):
        for calls in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(mlflow_client, "open_client", dying_after(calls, after))
                with pytest.raises(Killed):
                    act(uri_of(versions))
            if ends == 1 and after and calls == 2:
                break  # the rollback had ended: another would be a second one
            act(uri_of(versions))
            assert standing(versions) == ends
            assert json.loads(find_model(uri_of(versions), "topics").tags[CHAMPIONS])[-1] == ends
            if calls == 1:  # back to the state before, for the second kill
                promote(uri_of(versions), pick_version(uri_of(versions), "topics", str(3 - ends)))


def test_by_rule_only_what_beats_the_champion_is_promoted(versions):
    run, rows = versions / "runs" / "topics-0badcafe", np.arange(400)
    right = {"label": rows % 4, "prediction": rows % 4, "loss_sum": rows / 400}
    half = right | {"prediction": np.where(rows % 2, rows % 4, (rows + 1) % 4)}
    for better, worse, code in ((20, 10, 0), (10, 20, 6)):
        promote(uri_of(versions), pick_version(uri_of(versions), "topics", "1"))
        write_row_scores(run, better, rows, right)
        write_row_scores(run, worse, rows, half)
        done = call(versions, "promote", "topics", "2", "--if-better")
        assert getattr(done.exception, "exit_code", 0) == code, done.exception
        assert f"{'beats' if code == 0 else 'does not beat'}" in done.output
        assert standing(versions) == (2 if code == 0 else 1)


def test_one_flipped_bit_an_absent_file_and_an_added_one_are_found(versions):
    chosen = pick_version(uri_of(versions), "topics", None)
    assert [check.state for check in verify_files(chosen)] == ["ok"]
    file = Folder(chosen.source).path / "config.json"
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "registered with" in verify_files(chosen)[0].state
    done = call(versions, "verify", "topics", "--json")
    assert json.loads(done.stdout)[0]["file"] == "config.json"
    assert "not as it was registered: config.json" in str(done.exception)
    file.unlink()
    (file.parent / "extra.bin").write_bytes(b"")
    assert [check.state for check in verify_files(chosen)] == ["is missing", "was not registered"]


def test_old_folders_are_collected_and_what_is_needed_stays(versions):
    sources = [pick_version(uri_of(versions), "topics", str(number)).source for number in (1, 2)]
    promote(uri_of(versions), pick_version(uri_of(versions), "topics", "2"))
    assert collect(uri_of(versions), "topics", keep=0, delete=True) == []  # the champion and the one before it
    rollback(uri_of(versions), "topics")
    (listed,) = collect(uri_of(versions), "topics", keep=0, delete=False)
    assert (listed.version, listed.folder) == (2, sources[1]) and Folder(sources[1]).list()
    assert collect(uri_of(versions), "topics", keep=1, delete=True) == []
    done = call(versions, "gc", "topics", "--keep", "0", "--delete", "--json")
    assert [one["version"] for one in json.loads(done.stdout)] == [2]
    assert [bool(Folder(source).list()) for source in sources] == [True, False]
    with pytest.raises(JobError, match="were deleted"):
        promote(uri_of(versions), pick_version(uri_of(versions), "topics", "2"))


def test_the_folder_alone_is_printed_and_unknown_versions_are_named(versions):
    assert call(versions, "path", "topics").output == f"{versions}/runs/topics-0badcafe/export/step-00000010\n"
    assert call(versions, "path", "topics", "2").output.endswith("step-00000020\n")
    with pytest.raises(JobError, match="no version '7'; there are 2, 1"):
        pick_version(uri_of(versions), "topics", "7")


def test_versions_are_one_line_each_and_a_number_shows_all(versions):
    lines = call(versions, "show", "topics").output.splitlines()
    assert len(lines) <= 12
    one = call(versions, "show", "topics", "1").output
    assert "lineage.seed" in one and "config.json" in one and "metrics.accuracy" in one
    assert [record["version"] for record in json.loads(call(versions, "show", "topics", "--json").stdout)] == [2, 1]


def test_no_command_imports_a_heavy_library(versions):
    """They answer in less than 1.5 s of CPU, of which each of these takes 0.3 to 2."""
    run, rows = versions / "runs" / "topics-0badcafe", np.arange(400)
    for step, wrong in ((10, 0), (20, 100)):
        numbers = {"label": rows % 4, "prediction": (rows + (rows < wrong)) % 4, "loss_sum": rows / 400}
        write_row_scores(run, step, rows, numbers)
    program = """
import sys
from orchestrator.cli import app
for words in sys.stdin.read().splitlines():
    try:
        app(["registry", *words.split(), "--storage", sys.argv[1]], standalone_mode=False)
    except Exception as error:
        assert "did not become champion" in str(error), error
    heavy = {"mlflow", "sqlalchemy", "torch", "transformers", "datasets", "ray", "pandas", "sklearn", "scipy.stats"}
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""
    commands = ["list", "show topics", "show topics 1", "path topics", "verify topics", "compare topics 1 2"]
    commands += ["promote topics 2 --if-better", "promote topics 2", "rollback topics", "gc topics --keep 0 --delete"]
    words = [sys.executable, "-c", program, str(versions)]
    done = subprocess.run(words, input="\n".join(commands), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not promoted: accuracy 0.75 does not beat 1 of the champion" in done.stdout
    assert "topics version 2 is champion" in done.stdout and "topics version 1 is champion again" in done.stdout
    assert not Folder(f"{run}/export/step-00000020").list()


def test_two_processes_that_register_at_once_give_one_champion_that_knows_the_other(storage, tmp_path):
    program = """
import sys
from orchestrator.registry.manage import registry_lock
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.read import champion
from tests.orchestrator.registry.test_registry import enter, uri_of
from trainers.storage import Folder
storage = Folder(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
with registry_lock(uri_of(storage)):
    free = champion(uri_of(storage), "topics") is None
    enter(storage, Promotion(promote=free, reason="first" if free else "second"), step=int(sys.argv[2]))
"""
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(storage), step],
            env=os.environ | {"PYTHONPATH": "."},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for step in ("10", "20")
    ]
    for process in racing:
        assert process.stdout.readline() == "ready\n"
    for process in racing:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=400) for process in racing] == [0, 0]
    versions = find_model(uri_of(storage), "topics").ours()
    assert sorted((one.decision, one.champion) for one in versions) == [("first", True), ("second", False)]


def test_a_run_that_is_trained_anew_is_another_version_and_the_first_is_replaced(storage):
    """Its folder was removed to start over, and the best checkpoint is of the same step."""
    enter(storage, YES)
    (storage / "runs" / "topics-0badcafe").delete()
    for _ in range(2):
        second = enter(storage, YES, value=0.99, body=b'{"trained": "anew"}')
        assert (second.version, second.alias) == (2, "champion")
    new, old = find_model(uri_of(storage), "topics").ours()
    assert (new.version, new.metrics["accuracy"], old.metrics["accuracy"]) == (2, 0.99, 0.75)
    assert [check.state for check in verify_files(new)] == ["ok"]
    for act in (lambda: promote(uri_of(storage), old), lambda: rollback(uri_of(storage), "topics")):
        with pytest.raises(JobError, match=r"replaced when its run was trained anew|no champion before"):
            act()
    assert collect(uri_of(storage), "topics", keep=1, delete=True) == [] and Folder(new.source).exists("config.json")


def test_a_folder_that_another_model_names_is_not_collected(storage):
    enter(storage, YES, step=10)
    enter(storage, YES, step=10, registry={"model": "prod"})
    for number in range(3):
        enter(storage, YES, name=f"topics-0000000{number}")
    assert [one.version for one in collect(uri_of(storage), "topics", keep=1, delete=True)] == [2]
    assert [check.state for check in verify_files(champion(uri_of(storage), "prod"))] == ["ok"]
