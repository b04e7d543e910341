"""Submitting through Ray Jobs to a real head node: logs come as they are written, exit codes pass through."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.submitting.jobs import find_job
from orchestrator.submitting.submit import connect, follow, runtime_env, send, submit, use_token
from trainers.errors import JobError, PlacementError
from trainers.job.load import parse_job

pytestmark = pytest.mark.cluster


@pytest.fixture
def client(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return connect(head)


def job_of(**change):
    raw = {
        "name": "topics",
        "task": "classify",
        "model": {"path": "some/model"},
        "data": {"train": ["/data/train.jsonl"], "eval": ["/data/eval.jsonl"]},
        "train": {"global_batch_size": 32, "steps": 50, "learning_rate": 1.0e-4},
        "storage": "/shared/runs",
    }
    return parse_job(raw | change)


def test_the_job_runs_this_code_on_the_resolved_job_and_its_exit_code_is_returned(client, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    program = (
        'import os, sys, orchestrator, trainers; from trainers.job.load import load_job; job = load_job("job.yaml"); '
        "print(job.storage, job.train.steps); print(trainers.__file__, orchestrator.__file__); "
        'print(sys.executable); print(os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_TOKEN")); sys.exit(75)'
    )
    assert follow(client, send(client, job_of(), f"-c '{program}'")) == 75
    lines = capsys.readouterr().out.splitlines()
    assert "/shared/runs 50" in lines
    assert sum("py_modules_files" in part for line in lines for part in line.split()) == 2
    assert sys.executable in lines
    assert "1 None" in lines


@pytest.mark.parametrize("code", [2])
def test_exit_codes_pass_through_with_the_last_word_of_the_log(client, capsys, code):
    program = f'import sys; print("the last word"); sys.exit({code})'
    assert follow(client, send(client, job_of(), f"-c '{program}'")) == code
    assert "the last word" in capsys.readouterr().out.splitlines()


def test_a_driver_that_was_killed_counts_as_failed_training(client, capsys):
    assert follow(client, send(client, job_of(), "-c 'import os; os.kill(os.getpid(), 9)'")) == 5
    assert "FAILED" in capsys.readouterr().err


def heed_interrupts():
    """Undo what a shell does to `pytest &`, whose children would otherwise ignore SIGINT, and Python with them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_logs_come_while_the_job_runs_and_interrupting_leaves_it_running(client, head, tmp_path):
    submission = send(client, job_of(), "-c 'import time; print(\"begun\", flush=True); time.sleep(300)'")
    program = f"""
        import sys
        from orchestrator.submitting.submit import connect, follow
        sys.exit(follow(connect("{head}"), "{submission}", "{head}"))
    """
    follower = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        preexec_fn=heed_interrupts,
    )
    try:
        seen = ""
        while "begun" not in seen.splitlines():
            line = follower.stdout.readline()
            assert line, follower.stderr.read()
            seen += line
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=120)
        assert follower.returncode == 130
        assert f"tuneyard jobs stop {submission} --address {head}" in said
        assert str(client.get_job_status(submission)) == "RUNNING"
    finally:
        follower.kill()
        client.stop_job(submission)
    assert follow(client, submission) == 75


def test_a_job_is_left_there_at_the_address_that_the_environment_names(client, head, tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of().model_dump(mode="json")))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    done = CliRunner().invoke(app, ["submit", str(tmp_path / "job.yaml"), "--detach"])
    assert done.exit_code == 0, done.exception
    *_, submission = done.stdout.splitlines()[0].split()
    assert f"tuneyard jobs logs -f {submission} --address {head}" in done.stdout
    followed = CliRunner().invoke(app, ["jobs", "logs", "-f", submission])
    assert followed.exit_code == 2  # its data is nowhere
    again = CliRunner().invoke(app, ["jobs", "logs", submission])
    assert again.exit_code == 0
    assert "no such file" in again.stdout and again.stdout in followed.stdout
    listed = json.loads(CliRunner().invoke(app, ["jobs", "list", "--json"]).stdout)
    mine = next(one for one in listed if one["id"] == submission)
    assert (mine["job"], mine["status"], mine["exit_code"]) == ("topics", "FAILED", 2)
    assert mine["id"] in "".join(CliRunner().invoke(app, ["jobs", "list"], env={"COLUMNS": "200"}).stdout.split())


def test_only_our_own_words_are_printed(head, tmp_path):
    """In a process of its own, as a user starts it: Ray sets its loggers up while it is imported."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of().model_dump(mode="json")))
    words = [sys.executable, "-m", "orchestrator", "submit", str(tmp_path / "job.yaml"), "--address", head, "--detach"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["submitted", "follow:", "stop:"]


def test_a_job_that_is_stopped_has_its_time_to_commit(client, head, monkeypatch):
    """Ray alone kills what has not ended 3 s after SIGTERM."""
    program = (
        "import signal, sys, time; "
        'signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), print("committed", flush=True), sys.exit(75))); '
        'print("begun", flush=True); time.sleep(300)'
    )
    submission = send(client, job_of(name="slow"), f"-c '{program}'")
    deadline = time.monotonic() + 200
    while "begun" not in (said := client.get_job_logs(submission)).splitlines():
        assert time.monotonic() < deadline, f"{client.get_job_status(submission)}: {said}"
        time.sleep(0.5)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    stopped = CliRunner().invoke(app, ["jobs", "stop", "slow"])
    assert (stopped.exit_code, stopped.stdout) == (0, f"{submission}: STOPPED\n")
    assert "committed" in client.get_job_logs(submission).splitlines()
    assert CliRunner().invoke(app, ["jobs", "stop", submission]).exit_code == 0  # it has ended


def test_a_job_that_is_not_there_or_not_alone_is_named(client, head):
    first, second = (send(client, job_of(name="twice"), "-c pass") for _ in range(2))
    with pytest.raises(JobError, match=f"several jobs: .*{first}"):
        find_job(client, "twice")
    assert find_job(client, second[:-1]) == second
    with pytest.raises(JobError, match=r"no job 'nothing' was submitted there; there are: .*tuneyard-twice"):
        find_job(client, "nothing")


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(client, capsys, tmp_path):
    """The real server behind a connection that breaks after each new word; the next is said once it has broken."""

    breaks = []

    class Broken:
        def __getattr__(self, name):
            return getattr(client, name)

        async def tail_job_logs(self, submission_id):
            heard = ""
            async for text in client.tail_job_logs(submission_id):
                yield text
                heard += text
                if heard.count("word") > len(breaks):
                    breaks.append(text)
                    (tmp_path / f"broken-{len(breaks)}").touch()
                    raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    program = tmp_path / "program.py"
    program.write_text(f"""
import time
from pathlib import Path
for number in range(3):
    print("word", number, flush=True)
    deadline = time.monotonic() + 200
    while not Path("{tmp_path}", f"broken-{{number + 1}}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
""")
    assert follow(Broken(), send(client, job_of(), str(program))) == 0
    said = capsys.readouterr().out
    assert len(breaks) == 3
    assert [said.count(f"word {number}\n") for number in range(3)] == [1] * 3


def test_a_wrong_job_is_refused_before_anything_is_sent(tmp_path, client, head):
    before = len(client.list_jobs())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of().model_dump(mode="json") | {"trian": {}}))
    with pytest.raises(JobError, match="did you mean 'train'"):
        submit(tmp_path / "job.yaml", [], head)
    assert len(client.list_jobs()) == before


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://no-such-host.invalid:8265", "ftp://x"])
def test_an_address_that_does_not_answer_is_one_message(tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of().model_dump(mode="json")))
    with pytest.raises(PlacementError, match="http://HEAD:8265") as caught:
        submit(tmp_path / "job.yaml", [], address)
    assert caught.value.exit_code == 3


def test_only_the_named_variables_travel(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "DS_ACCELERATOR": "cpu"}
    assert runtime_env(tmp_path, environment, 29.5)["env_vars"] == {
        "HF_HUB_OFFLINE": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }


def test_a_token_at_hand_is_used_unless_the_user_says_otherwise(tmp_path):
    environment = {}
    use_token(environment, tmp_path)
    assert environment == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    use_token(environment, tmp_path)
    assert environment == {"RAY_AUTH_MODE": "token"}
    said = {"RAY_AUTH_MODE": "disabled"}
    use_token(said, tmp_path)
    assert said == {"RAY_AUTH_MODE": "disabled"}
