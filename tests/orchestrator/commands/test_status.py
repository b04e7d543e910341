"""Status: told from files alone, whatever state a run was left in."""

import fcntl
import io
import json
import os
import time

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.status import RunStatus, run_status
from orchestrator.commands.status_view import block, show_status
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
    lines = "\n".join(block(one))
    assert "step 20 of 50, " in lines and "newest checkpoint: step 20" in lines
    assert "best accuracy 0.7000 at step 10" in lines


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


def test_what_goes_on_before_the_first_step_is_told(storage):
    run = make_run(storage, steps=0, age_s=0)
    begun = [{"kind": "stage_start", "time": time.time(), "stage": "train"}]
    run.write_bytes("events.jsonl", (json.dumps(begun[0]) + "\n").encode())
    assert "step 0 of 50, starting the workers: loading, self-tests" in "\n".join(block(only(storage)))
    step = {"kind": "step", "time": time.time(), "step": 1, "loss": 1.0}
    run.write_bytes("events.jsonl", "".join(json.dumps(event) + "\n" for event in [*begun, step]).encode())
    assert only(storage).doing is None


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
    assert block(only(storage)) == ["new-00000000  interrupted", "  step 0"]


def test_a_long_run_is_read_from_its_ends(storage):
    run = make_run(storage, steps=20_000)
    lines = run.read_bytes("events.jsonl").splitlines(keepends=True)
    lines.insert(10_000, b'{"kind": "restart", "time": 1.0, "cause": "x"}\n')
    run.write_bytes("events.jsonl", b"".join(lines))
    assert (only(storage).step, only(storage).restarts) == (20_000, 0), "what lies between is not read"
    run.write_bytes("events.jsonl", b"".join(lines[9_990:]))
    assert only(storage).restarts == 1


def test_runs_are_chosen_by_name_start_or_path(storage):
    run = make_run(storage)
    make_run(storage, "other-11111111")
    (elsewhere,) = run_status(Folder("nowhere"), str(run))
    assert elsewhere.run == "topics-0badcafe"
    for wanted in ("topics-0badcafe", "topics", str(run), str(run) + "/"):
        assert only(storage, wanted).run == "topics-0badcafe"
    with pytest.raises(JobError, match="topics-0badcafe"):
        run_status(storage, "topic-0badcafe")


def append(run, *events):
    lines = "".join(json.dumps(event) + "\n" for event in events)
    run.write_bytes("events.jsonl", run.read_bytes("events.jsonl") + lines.encode())


@pytest.mark.parametrize(
    ("stopped", "state"),
    [(None, "trained"), ("early_stopping", "trained"), ("preempted", "preempted"), ("paused", "paused")],
)
@pytest.mark.parametrize("age_s", [5, 10_000])
def test_a_run_of_torchrun_says_at_once_that_it_has_ended(storage, stopped, state, age_s):
    run = make_run(storage, age_s=age_s)
    append(run, {"kind": "done", "time": time.time() - age_s, "step": 20, "tokens": 1, "stopped": stopped})
    assert only(storage).state == state
    append(run, {"kind": "start", "time": time.time(), "step": 20, "steps": 50, "world_size": 2})
    assert only(storage).state == "running", "it was started again"


def test_a_folder_with_evaluations_alone_is_no_run(storage):
    evaluate(storage / "runs" / "topics-11111111", 0, {"accuracy": 0.1})
    assert run_status(storage) == []


def test_the_time_left_the_last_restart_and_the_logs_are_told(storage):
    run = make_run(storage, age_s=2)
    append(run, {"kind": "restart", "time": time.time() - 1, "cause": "rank 1 on n1 was killed by SIGKILL"})
    (run / "logs").write_bytes("rank-00000.log", b"x")
    one = only(storage)
    assert one.state == "running" and one.left_s == pytest.approx(30)
    lines = "\n".join(block(one))
    assert "30 s left" in lines and "1 restart, the last" in lines and "killed by SIGKILL" in lines
    assert lines.splitlines()[-1].strip() == f"logs {run}/logs"


def test_a_missing_folder_is_an_error_and_no_empty_list(storage):
    asked = CliRunner().invoke(app, ["status", "--storage", f"{storage}/elsewhere"])
    assert asked.exit_code != 0 and "no folder" in str(asked.exception)


def test_a_job_file_names_its_run(storage, tmp_path):
    run, path = make_run(storage), tmp_path / "job.yaml"
    path.write_bytes(run.read_bytes("job.yaml"))
    assert only(Folder("nowhere"), str(path)).run == "topics-0badcafe"


def test_in_a_pipe_a_run_is_one_line_of_values(storage, capsys):
    make_run(storage)
    show_status(lambda: run_status(storage), follow=False, console=Console(file=io.StringIO()))
    names, values = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert len(names) == len(values) and dict(zip(names, values, strict=True))["best_step"] == "10"


def test_a_terminal_of_80_columns_shows_whole_lines(storage):
    make_run(storage, age_s=7093)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    show_status(lambda: run_status(storage), follow=False, console=console)
    shown = screen.getvalue()
    assert "last event 1 h 58 min ago" in shown and "best accuracy 0.7000 at step 10" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_following_ends_with_the_run(storage, capsys, monkeypatch):
    monkeypatch.setattr("orchestrator.commands.status_view.FOLLOW_S", 0.0)
    states = iter(["running", "running", "done", "done"])
    asked = []

    def ask():
        asked.append(RunStatus(run="r", folder="f", state=next(states), step=len(asked) // 2))
        return asked[-1:]

    show_status(ask, follow=True, console=Console(file=io.StringIO()))
    assert [one.state for one in asked] == ["running", "running", "done"]
    assert capsys.readouterr().out.count("running") == 1, "what has not changed is not said again"
