"""Credentials in URIs go to the library that connects, and nowhere else."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from trainers import credentials, storage
from trainers.credentials import VARIABLE, hide_credentials, put_back, take_out
from trainers.errors import JobError
from trainers.job.load import load_job, parse_job
from trainers.job.schema import Job
from trainers.storage import Folder

SECRET = "hUnTeR2secret"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "{}")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"s3://KEY:{SECRET}@bucket/a/*.jsonl?endpoint_override=h:9", "s3://bucket/a/*.jsonl?endpoint_override=h:9"),
        (f"s3://KEY:sl/ash{SECRET}@bucket/a b", "s3://bucket/a b"),
        (f"postgresql+psycopg2://me:{SECRET}@db:5432/ml", "postgresql+psycopg2://db:5432/ml"),
        (f"https://{SECRET}@mlflow.example/x?a=1&access_token={SECRET}", "https://mlflow.example/x?a=1"),
        (f"gs://bucket/x?credential={SECRET}", "gs://bucket/x"),
        ("s3://bucket:9000/a@b", "s3://bucket:9000/a@b"),
        ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x"),
        ("hdfs://me@host:9000/x", "hdfs://me@host:9000/x"),
        ("hf://squad@v1:train", "hf://squad@v1:train"),
        ("/data/me@home/x.jsonl", "/data/me@home/x.jsonl"),
    ],
)
def test_what_is_shown_has_no_secret_and_what_connects_has_it(uri: str, shown: str) -> None:
    assert take_out(uri) == shown
    whole = put_back(shown)
    assert sorted(whole) == sorted(uri), "as it was given, the order of its options aside"
    assert take_out({"a": [uri, 1], "b": (uri,)}) == {"a": [shown, 1], "b": (shown,)}


def test_the_file_system_is_opened_with_them_and_errors_do_not_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class FileSystem:
        @staticmethod
        def from_uri(uri: str) -> None:
            asked.append(uri)
            raise OSError(f"no route to {uri}, key {SECRET}")

    monkeypatch.setattr(storage.pafs, "FileSystem", FileSystem)
    folder = Folder(f"s3://KEY:{SECRET}@bucket/runs")
    assert SECRET not in f"{folder} {folder!r} {folder / 'x'} {folder.parent}"
    with pytest.raises(OSError, match="cannot use") as caught:
        (folder / "x").list()
    assert asked == [f"s3://KEY:{SECRET}@bucket/runs/x"]
    assert SECRET not in str(caught.value) and "KEY" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__, "nor does a traceback"


def planted(tmp_path: Path) -> dict[str, object]:
    """A job with a secret in every field that can carry one."""

    def uri(name: str) -> str:
        return f"s3://{name}KEY:{SECRET}{name}@{name}/x"

    return {
        "name": "x", "task": "classify", "storage": uri("storage"),
        "model": {"path": uri("model")},
        "data": {"train": [uri("train"), {"path": uri("part"), "weight": 2.0}], "eval": [uri("eval")]},
        "train": {"global_batch_size": 8, "steps": 1, "learning_rate": 1e-3, "distill": {"teacher": uri("teacher")}},
        "checkpoint": {"storage": uri("checkpoint")},
        "registry": {"uri": f"https://me:{SECRET}uri@mlflow.example"},
    }  # fmt: skip


def test_a_job_holds_none_and_the_processes_of_its_run_know_them(tmp_path: Path) -> None:
    job = parse_job(planted(tmp_path))
    assert SECRET not in f"{job!r} {job.model_dump()} {job.model_dump_json()} {job.identity()}"
    again = parse_job(json.loads(job.model_dump_json()))
    assert again == job, "job.yaml reads back"
    assert again.identity() == parse_job(planted(tmp_path)).identity(), "a new key is no new job"
    assert SECRET in put_back(job.checkpoint.storage or "")
    read = "import sys, pickle; from trainers.credentials import put_back; x = pickle.loads(sys.stdin.buffer.read())\n"
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    for travels, shows in ((job, "x.checkpoint.storage"), (Folder(f"s3://K:{SECRET}@b/x"), "x.uri")):
        told = subprocess.run(
            [sys.executable, "-c", read + f"print({shows}, put_back({shows}))"],
            input=pickle.dumps(travels), capture_output=True, check=True, env=clean,
        ).stdout.decode().split()  # fmt: skip
        assert SECRET not in told[0] and SECRET in told[1]
    child = subprocess.run([sys.executable, "-c", "from trainers.credentials import put_back\n"
                            f"print(put_back({job.storage!r}))"], capture_output=True, check=True)  # fmt: skip
    assert SECRET in child.stdout.decode(), "a process that was started later"


def test_messages_about_a_bad_job_show_none(tmp_path: Path) -> None:
    raw = planted(tmp_path)
    raw["checkpoint"] = {"storag": f"s3://K:{SECRET}@b"}
    raw["scale"] = {"workers": f"s3://K:{SECRET}@b"}
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    assert SECRET not in str(caught.value)
    broken = tmp_path / "job.yaml"
    broken.write_text(f"storage: [s3://K:{SECRET}@b\nx: ]: y")
    with pytest.raises(JobError) as caught:
        load_job(broken)
    assert SECRET not in str(caught.value)
    broken.write_text("name: x")
    with pytest.raises(JobError) as caught:
        load_job(broken, [f"s3://K:{SECRET}@b"])
    assert SECRET not in str(caught.value)


def test_what_a_library_says_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(f"s3://KEY9:{SECRET}@bucket")
    assert hide_credentials(f"403 for KEY9 at s3://a:b@bucket with {SECRET}") == "403 for *** at s3://bucket with ***"
    assert isinstance(Job.model_fields, dict) and credentials.travelling()[VARIABLE]
