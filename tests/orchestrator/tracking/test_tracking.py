"""Who follows a run: MLflow and Weights & Biases while it goes on, a web hook at its end; nothing breaks the run."""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from orchestrator.registry.mlflow_client import open_client, registry_uri
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.register import register
from orchestrator.tracking import follower as follower_module
from orchestrator.tracking import outlets
from orchestrator.tracking.follower import Follower
from orchestrator.tracking.outlets import follow
from tests.orchestrator.registry.test_registry import job_of, manifest_of
from trainers.errors import JobError
from trainers.model.source import ModelFolder
from trainers.run.events import DoneEvent, EvaluationEvent, StepEvent
from trainers.run.folder import Evaluation, RunResult
from trainers.run.log import RunLog
from trainers.run.record import Run
from trainers.run.row_scores import write_row_scores
from trainers.shards.manifest import Shards
from trainers.storage import Folder

SECRET = "services/T00/B00/verysecret"


def run_of(storage, **change):
    """A run of which nothing has happened yet."""
    shards = Shards(train=manifest_of("train"), eval=manifest_of("eval"))
    model = ModelFolder("some/model", "digest")
    folder = storage / "runs" / "topics-0badcafe"
    return Run(job=job_of(storage, **change), model=model, shards=shards, folder=folder)


def write_result(run, status, best=None, **values):
    result = RunResult(status=status, best=best, steps=4, **values)
    run.folder.write_bytes("result.json", result.model_dump_json().encode())


def step(number, loss=1.0):
    return StepEvent(step=number, loss=loss, learning_rate=1e-4, tokens=10)


def train(run, *events):
    with closing(RunLog(run.folder, job=run.job)) as log:
        for event in events:
            log.append(event)


def mlflow_run(storage):
    """A client and the only run."""
    client = open_client(registry_uri(str(storage)))
    (run,) = client.search_runs([client.get_experiment_by_name("topics").experiment_id])
    return client, run


def metrics_of(storage):
    """The latest points; none while there is no run yet."""
    client = open_client(registry_uri(str(storage)))
    experiment = client.get_experiment_by_name("topics")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return {name: value for run in runs for name, value in [*run.data.metrics.items(), ("status", run.info.status)]}


def wait_for(reached):
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def history(client, run, name):
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}


def test_mlflow_follows_live_and_the_same_run_goes_on_after_a_failure(storage, monkeypatch):
    monkeypatch.setattr(follower_module, "CLOSE_WAIT_S", 400.0)  # the second has only begun to import MLflow by then
    run, said = run_of(storage), []
    with pytest.raises(JobError), Follower(run, said.append) as follower:
        train(run, step(1), step(2))
        wait_for(lambda: {"train/loss", "system/cpu_utilization_percentage"} <= metrics_of(storage).keys())
        client, live = mlflow_run(storage)
        assert live.info.status == "RUNNING" and live.data.params["train.seed"] == "11"
        write_result(run, "failed", error="out of memory")
        follower.word = "ended"
        raise JobError("out of memory")
    assert mlflow_run(storage)[1].info.status == "FAILED"
    with Follower(run, said.append) as follower:
        train(run, step(2, 0.5), step(3, 0.25), EvaluationEvent(step=3, metrics={"accuracy": 0.75, "f1/some label": 1}))
        write_row_scores(run.folder, 3, np.arange(2), {"label": np.arange(2), "prediction": np.arange(2)}, ["a", "b"])
        run.folder.write_bytes("report.html", b"<p>")
        write_result(run, "done", {"step": 3, "metric": "accuracy", "value": 0.75})
        follower.word = "ended"
    client, again = mlflow_run(storage)
    assert again.info.run_id == live.info.run_id and again.info.status == "FINISHED"
    assert history(client, again, "train/loss") == {1: 1.0, 2: 0.5, 3: 0.25}
    assert history(client, again, "eval/accuracy") == {3: 0.75} and "per_class/f1/some label" in again.data.metrics
    assert {file.path for file in client.list_artifacts(again.info.run_id)} == {"report.html", "confusion.png"}
    uses = {one.tags[0].value: one.dataset for one in again.inputs.dataset_inputs}
    assert uses.keys() == {"training", "evaluation"} and uses["training"].digest == "key-train"
    assert json.loads(uses["training"].profile)["tokens"] == 90
    assert said == []


def test_a_version_has_the_followed_run_and_mlflows_own_logged_model(storage):
    run = run_of(storage)
    train(run, step(1), step(2))
    follow(run, io.BytesIO(b""))
    export = run.folder / "export" / "step-00000002"
    export.write_bytes("config.json", b"{}")
    best = Evaluation(step=2, status="done", metrics={"accuracy": 0.75}, eval_key="e1")
    register(run.job, run.folder, best, export, {}, Promotion(promote=True, reason="yes"))
    client, told = mlflow_run(storage)
    assert told.info.status == "FINISHED" and history(client, told, "train/loss") == {1: 1.0, 2: 1.0}
    (output,) = told.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert str(model.status).endswith("READY") and [one.value for one in model.metrics] == [0.75]
    assert client.get_model_version("topics", "1").run_id == told.info.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "topics", "version": 1}]


def test_a_killed_driver_leaves_a_killed_run(storage):
    program = """
        import os, signal, sys
        from orchestrator.tracking.follower import Follower
        from tests.orchestrator.tracking.test_tracking import run_of, step, train
        from trainers.storage import Folder
        run = run_of(Folder(sys.argv[1]))
        with Follower(run, print):
            train(run, step(1))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(storage)], env=environment, check=False)
    assert done.returncode == -9
    wait_for(lambda: metrics_of(storage).get("status") == "KILLED")
    assert mlflow_run(storage)[1].data.metrics["train/loss"] == 1.0


@pytest.mark.parametrize("stopped, status", [("paused", "SCHEDULED"), (None, "FINISHED")])
def test_a_leg_of_a_sweep_waits_in_mlflow_or_is_finished(storage, stopped, status):
    run = run_of(storage)
    train(run, step(1), DoneEvent(step=1, stopped=stopped))
    follow(run, io.BytesIO(b"paused"))
    assert mlflow_run(storage)[1].info.status == status


def test_what_a_registry_that_is_away_missed_is_sent_when_it_is_back(tmp_path, empty_database, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(outlets, "EVERY_S", 0.1)
    monkeypatch.setattr(outlets, "_say", said.append)
    storage = Folder(str(tmp_path / "storage"))
    (tmp_path / "not a folder").write_text("")
    (tmp_path / "place").symlink_to("not a folder")
    run = run_of(storage, registry={"uri": f"sqlite:///{tmp_path}/place/mlflow.db"})
    train(run, step(1), step(2))
    read, write = os.pipe()
    follower = threading.Thread(target=follow, args=(run, os.fdopen(read, "rb")))
    with os.fdopen(write, "wb"):  # the follower ends with it
        follower.start()
        wait_for(lambda: said)
        train(run, step(3))
        time.sleep(0.5)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "mlflow.db").write_bytes(empty_database.read_bytes())
        (tmp_path / "back").symlink_to("folder")
        (tmp_path / "back").replace(tmp_path / "place")  # at once: the follower is never shown half a registry
        wait_for(lambda: len(said) > 1)
    follower.join()
    tried, answers = said
    assert "MLflow" in tried and "tried again" in tried and "answers again" in answers
    client = open_client(run.job.registry.uri)
    (told,) = client.search_runs([client.get_experiment_by_name("topics").experiment_id])
    assert history(client, told, "train/loss") == {1: 1.0, 2: 1.0, 3: 1.0}


def test_weights_and_biases_has_the_points_of_a_run_that_went_on(storage, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_of(storage, report_to="wandb")
    train(run, step(1), step(2))
    write_result(run, "failed")
    follow(run, io.BytesIO(b"ended"))
    train(run, step(2, 0.5), EvaluationEvent(step=2, metrics={"accuracy": 0.75}))
    write_result(run, "done")
    follow(run, io.BytesIO(b"ended"))
    first, second = sorted((run.folder.path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert first.name.endswith(run.folder.name) and second.name.endswith(run.folder.name)
    (config, points, code), (_, more, last_code) = map(records_of, (first, second))
    assert config["train.seed"] == "11" and wandb.__version__
    assert [(point["step"], point["train/loss"]) for point in points] == [(1, 1.0), (2, 1.0)]
    assert [point.get("train/loss", point.get("eval/accuracy")) for point in more] == [0.5, 0.75]
    assert (code, last_code) == (1, 0)
    assert not (storage.path / "mlflow.db").with_name("mlartifacts").exists()


def records_of(folder):
    """Configuration, points and exit code that stand in an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, points, code = {}, [], None
    for data in log_records(next(folder.glob("*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
        points += [items] if items else []
        for one in record.run.config.update:
            config[one.key or ".".join(one.nested_key)] = json.loads(one.value_json)
        code = record.exit.exit_code if record.HasField("exit") else code
    return config, points, code


def log_records(content):
    """Records of a file in LevelDB's log format, after a head of 7 bytes: blocks of 32 KiB with parts of records."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (1 << 15) - at % (1 << 15) < 7:
            at += (1 << 15) - at % (1 << 15)
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.fixture
def hook():
    """A real HTTP server and what it was sent; it refuses the first message."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(503 if len(got) == 1 else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{SECRET}", got
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "word, status", [("ended", "done"), ("ended", "failed"), ("ended", "preempted"), ("", "killed")]
)
def test_a_web_hook_is_told_once_how_the_run_ended_and_its_path_is_shown_nowhere(storage, hook, capfd, word, status):
    address, got = hook
    run = run_of(storage, report_to="tensorboard", notify=address)
    train(run, step(1))
    run.folder.write_bytes("job.yaml", json.dumps(run.job.model_dump(mode="json")).encode())
    best = {"step": 3, "metric": "accuracy", "value": 0.75} if status == "done" else None
    write_result(run, "done" if status == "killed" else status, best, error="no room" if status == "failed" else None)
    follow(run, io.BytesIO(word.encode()))
    assert [path for path, _ in got] == [f"/{SECRET}"] * 2
    told = got[-1][1]
    assert told["status"] == status and told["run"] == run.folder.name
    assert ("accuracy 0.7500 at step 3" in told["text"]) == (status == "done")
    assert ("no room" in told["text"]) == (status == "failed")
    files = [path for path in storage.path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"verysecret" in path.read_bytes()]
    out = "".join(capfd.readouterr())
    assert "verysecret" not in out and "verysecret" not in repr(run) and "503" in out


def test_a_hook_that_is_no_address_is_refused_before_anything_starts(storage):
    with pytest.raises(JobError, match=r"notify: must be an address such as https://"):
        run_of(storage, notify="hooks.example.org/services")
