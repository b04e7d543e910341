"""Status: told from files alone, whatever state a run was left in."""

import fcntl
import json
import os
import time

import pytest
import yaml

from orchestrator.commands.status import headline, run_status
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.run.folder import Evaluation, RegisteredVersion, RunResult
from trainers.storage import Folder


@pytest.fixture
def storage(tmp_path):
    return Folder(str(tmp_path))


def job_of(storage, **change):
    raw = {
        "name": "topics",
        "task": "classify",
        "model": {"path": "some/model"},
        "data": {"train": ["/data/train.jsonl"], "eval": ["/data/eval.jsonl"]},
        "train": {"global_batch_size": 32, "steps": 50, "learning_rate": 1.0e-4},
        "storage": str(storage),
    }
    return parse_job(raw | change)


def make_run(storage, name="topics-0badcafe", age_s=10.0, steps=20, job=None):
    run = storage / "runs" / name
    job = job or job_of(storage)
    run.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    begun = time.time() - age_s - steps
    events = [
        {"kind": "step", "time": begun + step, "step": step, "loss": 1 / step, "tokens_per_s": 100.0 + step}
        for step in range(1, steps + 1)
    ]
    run.write_bytes("events.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())
    for step, value in ((10, 0.7), (20, 0.6)):
        (run / "checkpoints" / f"step-{step:08d}").write_bytes("COMMITTED", b"x")
        evaluate(run, step, {"accuracy": value, "loss": value})
    return run


def evaluate(run, step, metrics, status="done"):
    one = Evaluation(step=step, status=status, metrics=metrics, eval_key="e")
    run.write_json(f"evals/step-{step:08d}.json", one.model_dump(mode="json"))


def finish(run, status="done", **fields):
    run.write_json("result.json", RunResult(status=status, **fields).model_dump(mode="json"))


def only(storage, run=None):
    (one,) = run_status(storage, run)
    return one


def test_an_empty_storage_has_no_runs(storage):
    assert run_status(storage) == []


def test_progress_is_told_from_events_checkpoints_and_evaluations(storage):
    run = make_run(storage)
    (run / "checkpoints" / "step-00000030").write_bytes("rank-00000-of-00001.safetensors", b"not committed")
    one = only(storage)
    assert (one.step, one.steps, one.last_checkpoint) == (20, 50, 20)
    assert (one.metric, one.best_step, one.best_value) == ("accuracy", 10, 0.7)
    assert (one.loss, one.tokens_per_s) == (1 / 20, 120.0)
    assert 9 <= one.event_age_s < 60
    told = headline(one)
    assert (told["step"], told["checkpoint"], told["best"]) == ("20 of 50", "20", "accuracy 0.7000 at 10")


def test_the_steps_planned_are_those_the_ranks_named_at_their_start(storage):
    run = make_run(storage, steps=20_000)
    start = {"kind": "start", "time": 1.0, "step": 0, "steps": 33_000, "world_size": 2}
    run.write_bytes("events.jsonl", json.dumps(start).encode() + b"\n" + run.read_bytes("events.jsonl"))
    assert (only(storage).steps, only(storage).step) == (33_000, 20_000)


def test_a_metric_to_minimize_has_its_smallest_as_best_and_failures_never_count(storage):
    run = make_run(storage, job=job_of(storage, evaluate={"metric": "loss"}))
    evaluate(run, 30, {"loss": 0.1}, status="failed")
    evaluate(run, 40, {"loss": float("-inf")})
    assert (only(storage).best_step, only(storage).best_value) == (20, 0.6)


def test_a_run_is_running_while_its_driver_holds_the_lock_however_quiet(storage):
    run = make_run(storage, age_s=10_000)
    finish(run, "failed", error="of an earlier attempt")
    (run.path / "driver.lock").touch()
    with (run.path / "driver.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (only(storage).state, only(storage).error) == ("running", None)
    assert (only(storage).state, only(storage).error) == ("failed", "of an earlier attempt")


def test_a_killed_driver_leaves_an_interrupted_run_at_once(storage):
    run = make_run(storage, age_s=1)
    (run.path / "driver.lock").touch()
    assert only(storage).state == "interrupted"


@pytest.mark.parametrize(("age_s", "state"), [(5, "running"), (10_000, "interrupted")])
def test_without_a_lock_the_age_of_the_last_event_decides(storage, age_s, state):
    make_run(storage, age_s=age_s)
    assert only(storage).state == state


def test_asking_takes_no_lock_away_from_a_starting_driver(storage):
    run = make_run(storage)
    (run.path / "driver.lock").touch()
    run_status(storage)
    with (run.path / "driver.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_results_are_told(storage):
    run = make_run(storage)
    version = RegisteredVersion(model="topics", version=3, alias="champion", step=10, source="/x", decision="d")
    finish(run, registry=version)
    assert (only(storage).state, only(storage).registered) == ("done", "topics version 3")
    finish(run, "preempted")
    assert only(storage).state == "preempted"


def test_a_rerun_that_was_killed_is_interrupted_though_an_older_result_says_failed(storage):
    run = make_run(storage)
    finish(run, "failed", error="x")
    (run.path / "driver.lock").touch()
    an_hour_ago = time.time() - 3600
    os.utime(run.path / "result.json", (an_hour_ago, an_hour_ago))
    assert (only(storage).state, only(storage).error) == ("interrupted", None)


def test_torn_files_do_not_stop_the_others_from_being_told(storage):
    make_run(storage, "whole-00000001")
    torn = make_run(storage, "torn-00000002", age_s=5000)
    events = torn.read_bytes("events.jsonl") + b'{"kind": "step", "st'
    torn.write_bytes("events.jsonl", events)
    torn.write_bytes("result.json", b"{")
    torn.write_bytes("evals/step-00000010.json", b"{")
    first, second = run_status(storage)
    assert (first.run, second.run) == ("whole-00000001", "torn-00000002")
    assert (second.step, second.best_step, second.state) == (20, 20, "interrupted")
    assert "result.json is damaged" in second.error


def test_a_run_just_begun_has_a_state(storage):
    (storage / "runs" / "new-00000000").write_bytes("driver.lock", b"")
    assert only(storage).state == "interrupted"
    assert only(storage).best_step is None
    assert headline(only(storage))["best"] == ""


def test_a_long_run_is_read_from_its_end(storage):
    make_run(storage, steps=20_000)
    begun = time.monotonic()
    assert only(storage).step == 20_000
    assert time.monotonic() - begun < 2


def test_runs_are_chosen_by_name_start_or_path(storage):
    run = make_run(storage)
    make_run(storage, "other-11111111")
    (elsewhere,) = run_status(Folder("nowhere"), str(run))
    assert elsewhere.run == "topics-0badcafe"
    for wanted in ("topics-0badcafe", "topics", str(run), str(run) + "/"):
        assert only(storage, wanted).run == "topics-0badcafe"
    with pytest.raises(JobError, match="topics-0badcafe"):
        run_status(storage, "topic-0badcafe")
