"""The registry: a version a run's step, once, whatever is killed; with its lineage, and without secrets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

from orchestrator.registry import mlflow_client
from orchestrator.registry.lineage import lineage
from orchestrator.registry.mlflow_client import open_client, registry_uri
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.read import _from_client, _from_tables, champion, list_models, row_scores_of, show_model
from orchestrator.registry.register import register
from orchestrator.training.node_report import free_port
from tests.postgres import postgres
from trainers.errors import EvaluationError, JobError
from trainers.job.load import parse_job
from trainers.run.continued import Ancestor
from trainers.run.folder import Evaluation
from trainers.run.row_scores import write_row_scores
from trainers.shards.manifest import ShardManifest, ShardRecord, Shards
from trainers.storage import Folder
from trainers.training.divergence import SkippedStep, SkippedSteps

YES = Promotion(promote=True, reason="promoted: no champion yet")
NO = Promotion(promote=False, reason="not promoted: luck")


def job_of(storage, **change):
    raw = {
        "name": "topics",
        "task": "classify",
        "model": {"path": "some/model", "dtype": "float32"},
        "data": {"train": ["/data/train.jsonl"], "eval": ["/data/eval.jsonl"]},
        "train": {"global_batch_size": 32, "epochs": 2, "learning_rate": 1.0e-4, "seed": 11},
        "storage": str(storage),
    }
    return parse_job(raw | change)


def run_of(storage, name="topics-0badcafe"):
    """A run folder as training leaves it: two evaluations and their rows, events of a restarted run."""
    run = storage / "runs" / name
    for step, accuracy in ((10, 0.5), (20, 0.75)):
        evaluation = Evaluation(step=step, status="done", metrics={"accuracy": accuracy, "loss": 1.0}, eval_key="e1")
        run.write_json(f"evals/step-{step:08d}.json", evaluation.model_dump(mode="json"))
        write_row_scores(run, step, np.arange(4), {"label": np.arange(4), "prediction": np.arange(4)})
    steps = [*range(1, 15), *range(11, 21)]
    lines = [{"kind": "step", "time": 1.0 * i, "step": step, "loss": 1 / step + i} for i, step in enumerate(steps)]
    run.write_bytes("events.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return run


def best_of(step=20, value=0.75):
    return Evaluation(step=step, status="done", metrics={"accuracy": value, "loss": 1.0}, eval_key="e1", rows=4)


def enter(
    storage, decision=YES, step=20, name="topics-0badcafe", lineage=None, value=0.75, body=b"{}", **change
):  # fmt: skip
    run = run_of(storage, name)
    export = run / "export" / f"step-{step:08d}"
    export.write_bytes("config.json", body)
    return register(job_of(storage, **change), run, best_of(step, value), export, lineage or {"seed": "11"}, decision)


def uri_of(storage):
    return registry_uri(str(storage))


def test_a_version_is_registered_with_alias_source_metrics_and_lineage(storage):
    entered = enter(storage)
    assert (entered.model, entered.version, entered.alias, entered.step) == ("topics", 1, "champion", 20)
    assert Folder(entered.source).exists("config.json")
    (shown,) = show_model(uri_of(storage), "topics")
    assert shown.champion and shown.metrics == {"accuracy": 0.75, "loss": 1.0} and shown.metric == "accuracy"
    assert shown.lineage == {"seed": "11"}
    assert shown.run == str(storage / "runs" / "topics-0badcafe")
    (listed,) = list_models(uri_of(storage))
    assert (listed.model, listed.versions, listed.champion, listed.value) == ("topics", 1, 1, 0.75)


def test_mlflow_shows_the_parameters_and_curves_of_the_run(storage):
    enter(storage)
    client = open_client(uri_of(storage))
    (run,) = client.search_runs([client.get_experiment_by_name("topics").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.0001"
    assert run.data.metrics["registered/accuracy"] == 0.75
    assert run.data.tags["mlflow.user"] and "topics-0badcafe" in run.data.tags["mlflow.note.content"]
    history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "eval/accuracy")}
    assert history == {10: 0.5, 20: 0.75}
    losses = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert sorted(losses) == list(range(1, 21))
    assert losses[12] == 1 / 12 + 15  # as it ran after the restart


def test_registering_again_finds_the_same_version_and_keeps_its_decision(storage):
    first = enter(storage, YES)
    again = enter(storage, NO)
    assert again == first
    assert len(show_model(uri_of(storage), "topics")) == 1


def test_a_version_that_is_not_promoted_leaves_the_champion(storage):
    enter(storage, YES)
    second = enter(storage, NO, step=10)
    assert (second.version, second.alias, second.decision) == (2, None, NO.reason)
    assert champion(uri_of(storage), "topics").version == 1


def test_a_rerun_of_an_older_run_takes_the_alias_back_from_nobody(storage):
    enter(storage, YES, step=10)
    enter(storage, YES, step=20)
    assert enter(storage, YES, step=10).alias is None
    open_client(uri_of(storage)).set_registered_model_alias("topics", "champion", "1")  # a person rolls back
    assert enter(storage, YES, step=20).alias is None
    assert champion(uri_of(storage), "topics").version == 1


def test_the_champions_evaluation_rows_are_found_again(storage):
    enter(storage)
    row_scores = row_scores_of(champion(uri_of(storage), "topics"))
    assert row_scores.eval_key == "e1"
    assert row_scores.numbers["row"].tolist() == [0, 1, 2, 3]
    (storage / "runs").delete()
    assert row_scores_of(champion(uri_of(storage), "topics")).numbers == {}


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


class DyingClient:
    """A real client whose n-th call is the last thing that happens, before or after it took effect."""

    def __init__(self, client, calls, after):
        self.client, self.calls, self.after = client, calls, after

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls -= 1
            if self.calls == 0 and not self.after:
                raise Killed
            result = getattr(self.client, name)(*args, **kwargs)
            if self.calls == 0:
                raise Killed
            return result

        return call


def dying_after(calls, after):
    return lambda uri: DyingClient(open_client(uri), calls, after)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_the_same_command_registers_exactly_once(tmp_path, empty_database, monkeypatch, after):
    deaths = 0
    while True:
        folder = tmp_path / f"{deaths}"
        folder.mkdir()
        shutil.copy(empty_database, folder / "mlflow.db")
        storage = Folder(str(folder))
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_client, "open_client", dying_after(deaths + 1, after))
            try:
                enter(storage)
                break  # the call that should die was never reached: every one has been tried
            except Killed:
                deaths += 1
        assert enter(storage).alias == "champion"
        (shown,) = show_model(uri_of(storage), "topics")
        assert (shown.version, shown.champion, shown.settled) == (1, True, True)
        client = open_client(uri_of(storage))
        (run,) = client.search_runs([client.get_experiment_by_name("topics").experiment_id])
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 24  # four steps were done again
    assert deaths >= 10


def test_a_process_killed_after_creating_the_version_registers_once(storage):
    program = """
        import os, signal, sys
        from mlflow import MlflowClient
        from tests.orchestrator.registry.test_registry import enter
        from trainers.storage import Folder
        create = MlflowClient.create_model_version
        def create_and_die(*args, **kwargs):
            create(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        MlflowClient.create_model_version = create_and_die
        enter(Folder(sys.argv[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(storage)],
        env=os.environ | {"PYTHONPATH": "."},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert champion(uri_of(storage), "topics") is None
    assert enter(storage).alias == "champion"
    assert len(show_model(uri_of(storage), "topics")) == 1


def test_no_secret_reaches_the_registry(storage, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    job = job_of(storage, data={"train": ["s3://key:verysecret@bucket/train.jsonl"], "eval_fraction": 0.1})
    run = run_of(storage)
    shards = Shards(train=manifest_of("train"), eval=manifest_of("eval"))
    register(job, run, best_of(), run / "export", lineage(job, shards, "d1", SkippedSteps()), YES)
    assert b"verysecret" not in (storage.path / "mlflow.db").read_bytes()


def manifest_of(split):
    shard = ShardRecord(
        file="shard-00000.arrow",
        source=0,
        ledger="ledger-00000.arrow",
        unit="0",
        rows=9,
        tokens=90,
        targets=9,
        bytes=1,
        digest="d",
        outcomes={"kept": 8, "truncated": 1, "dropped:empty_text": 2},
        tokens_lost=5,
        labels={"a": 4, "b": 5},
    )
    return ShardManifest(key=f"key-{split}", key_parts={}, split=split, task="classify", sources=(), shards=(shard,))


def test_lineage_tells_data_job_code_libraries_and_seed(storage):
    job = job_of(storage)
    left_out = SkippedStep(step=6, loss="nan", reason="the loss is nan", sequences=(3,), rows=(("a.jsonl", 4),))
    shards = Shards(train=manifest_of("train"), eval=manifest_of("eval"))
    changed = {"train.learning_rate": (1e-3, 2e-3)}
    line = (Ancestor(run="tiny-0", step=8, digest="d0", changed=changed),)
    told = lineage(job, shards, "digest-1", SkippedSteps(steps=(left_out,)), line)
    assert told["train.continued"] == "steps 1-8: tiny-0 (d0); then train.learning_rate 0.001 -> 0.002"
    assert told["train.skipped"] == "step 7: the loss is nan, 1 rows"
    assert told["data.train.key"] == "key-train"
    assert told["data.train.ledger"] == "dropped:empty_text 2, kept 8, truncated 1"
    assert told["data.eval.rows_in"] == "11"
    assert yaml.safe_load(told["job"]) == job.model_dump(mode="json")
    assert told["seed"] == "11" and told["model.digest"] == "digest-1"
    assert told["version.torch"].startswith("2.")
    assert all(isinstance(value, str) for value in told.values())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert told.get("code.commit", commit) == commit


def test_looking_at_an_absent_registry_creates_nothing(tmp_path):
    uri = registry_uri(str(tmp_path))
    assert list_models(uri) == []
    assert champion(uri, "topics") is None
    with pytest.raises(JobError, match="empty"):
        show_model(uri, "topics")
    assert list(tmp_path.iterdir()) == []


def test_the_tables_and_mlflows_client_tell_the_same(storage):
    enter(storage, YES, step=10)
    enter(storage, NO, step=20)
    client = open_client(uri_of(storage))
    client.create_registered_model("somebody's")
    client.create_model_version("somebody's", "/elsewhere")
    client.create_model_version("topics", "/by/hand")
    client.delete_model_version("topics", client.create_model_version("topics", "/gone").version)
    tables, told = (
        read(source) for read, source in ((_from_tables, storage.path / "mlflow.db"), (_from_client, uri_of(storage)))
    )
    assert sorted(tables, key=lambda one: one.name) == sorted(told, key=lambda one: one.name)
    assert [(one.model, one.versions, one.champion) for one in list_models(uri_of(storage))] == [
        ("somebody's", 1, None),
        ("topics", 3, 1),
    ]
    assert [one.version for one in show_model(uri_of(storage), "topics")] == [2, 1]


def test_a_version_of_an_earlier_program_is_named(storage):
    enter(storage)
    open_client(uri_of(storage)).delete_model_version_tag("topics", "1", "tuneyard.version")
    with pytest.raises(EvaluationError, match=r"version 1 of topics .* name another registry\.model"):
        champion(uri_of(storage), "topics")


def test_a_storage_may_have_any_name(tmp_path, empty_database):
    folder = tmp_path / "50% ?a=b #c 'é\""
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    entered = enter(Folder(str(folder)))
    assert entered.alias == "champion" and Folder(entered.source).exists("config.json")
    assert champion(uri_of(folder), "topics").source == entered.source
    assert _from_client(uri_of(folder)) == _from_tables(folder / "mlflow.db")
    beside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)]
    assert all(path.is_dir() for path in beside)  # MLflow makes an empty folder of the encoded name


def test_an_unknown_model_is_refused_with_the_known_ones(storage):
    enter(storage)
    with pytest.raises(JobError, match="known: topics"):
        show_model(uri_of(storage), "topcs")
    assert champion(uri_of(storage), "topcs") is None


def test_remote_storage_without_a_server_names_the_key():
    with pytest.raises(JobError, match=r"registry\.uri"):
        registry_uri("s3://bucket/runs")
    assert registry_uri("s3://bucket/runs", "http://host:5000") == "http://host:5000"


def test_a_damaged_database_is_one_message_with_a_remedy(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EvaluationError, match=r"not a database; check that the file is whole") as caught:
        enter(Folder(str(tmp_path)))
    assert caught.value.exit_code == 6


def test_a_server_that_does_not_answer_is_one_message(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(EvaluationError, match=r"check registry\.uri"):
        list_models("http://user:verysecret@127.0.0.1:1")


class Racing:
    """A real client that lets another run register to the end right before it calls one method."""

    def __init__(self, client, method, other):
        self.client, self.method, self.other = client, method, other

    def __getattr__(self, name):
        if name == self.method and self.other:
            other, self.other = self.other, None
            other()
        return getattr(self.client, name)


@pytest.mark.parametrize(
    "method, winner",
    [("create_registered_model", 1), ("create_run", 1), ("create_model_version", 1), ("set_registered_model_alias", 2)],
)
def test_two_runs_that_race_without_a_lock_give_one_champion_that_both_tell(storage, monkeypatch, method, winner):
    """Both were weighed against no champion; the one that comes second does not take the alias from the first."""
    yes, told = YES.model_copy(update={"champion": None}), []

    def other():
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_client, "open_client", open_client)
            told.append(enter(storage, yes, name="other-1badcafe"))

    monkeypatch.setattr(mlflow_client, "open_client", lambda uri: Racing(open_client(uri), method, other))
    told.append(enter(storage, yes))
    assert {one.version for one in told} == {1, 2}
    assert [one.alias for one in told if one.alias] == ["champion"] or winner == 2
    standing = champion(uri_of(storage), "topics").version
    (loser,) = (one for one in show_model(uri_of(storage), "topics") if one.version != standing)
    assert loser.settled and told[-1].alias == ("champion" if told[-1].version == standing else None)
    assert (told[-1].decision.startswith("not promoted: version 1 became champion")) == (winner == 1)


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request, tmp_path):
    """A real tracking server on loopback, on either database."""
    if request.param == "sqlite":
        with tracking_server(tmp_path, f"sqlite:///{tmp_path}/server.db") as address:
            yield address
    else:
        with postgres() as database, tracking_server(tmp_path, database) as address:
            yield address


@contextmanager
def tracking_server(tmp_path, database):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", f"{tmp_path}/art"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_tracking_server_takes_the_version_and_a_copy_of_the_export(storage, server, tmp_path, capfd):
    """And nothing of the password in its address, here or there."""
    for _ in range(2):
        entered = enter(storage, registry={"uri": server.replace("//", "//me:verysecret@")})
    assert (entered.version, entered.alias) == (1, "champion")
    (shown,) = show_model(server, "topics")
    assert shown.champion
    assert list(tmp_path.glob("art/**/model/config.json"))
    files = [path for folder in (tmp_path, storage.path) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "server.log" for path in files)
    assert not [path for path in files if b"verysecret" in path.read_bytes()]
    assert "verysecret" not in "".join(capfd.readouterr())
