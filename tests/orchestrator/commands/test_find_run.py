"""A run is found by its job file, its name or its folder, by every command alike; --json is JSON alone on stdout."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.find_run import find_folder, find_job
from tests.test_docs import COMMANDS
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.run.folder import Evaluation, RunResult
from trainers.run.record import find_run
from trainers.storage import Folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Job:
    folder = tmp_path_factory.mktemp("find_run")
    job: Job = tiny_job(folder, make_bert(folder / "model", tiny_tokenizer), "classify", film_rows(20))
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    shard_locally(job)
    return job


@pytest.fixture(scope="module")
def run(job: Job) -> Folder:
    """The run folder as a finished run leaves it, without weights."""
    folder = find_run(job).folder
    folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    evaluation = Evaluation(step=3, status="done", metrics={"accuracy": 0.5}, eval_key="e")
    result = RunResult(status="done", best={"step": 3}, evaluations=(evaluation,))
    folder.write_bytes("result.json", result.model_dump_json().encode())
    return folder


def test_the_job_file_the_name_its_start_and_the_folder_mean_the_same_run(job: Job, run: Folder) -> None:
    job_file = str(run.path.parents[2] / "job.yaml")
    for words in ((job_file,), (run.name, job.storage), ("tin", job.storage), (str(run),), (f"{run}/",)):
        assert find_folder(*words).path == run.path
        assert find_job(*words)[0] == job


def test_a_folder_that_init_wrote_means_its_job_though_it_is_named_like_the_run(
    job: Job, run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.path.parents[2]
    monkeypatch.chdir(folder.parent)
    for word in (folder.name, f"{folder.name}/", str(folder)):
        assert find_folder(word).path == run.path
    shown = CliRunner().invoke(app, ["status", folder.name])
    assert shown.exit_code == 0 and run.name in shown.stdout


def test_what_is_no_run_is_named(job: Job, run: Folder, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"there are: {run.name}"):
        find_folder("tiny-0000", job.storage)
    with pytest.raises(JobError, match="does not exist"):
        find_folder(str(tmp_path / "nowhere"))
    with pytest.raises(JobError, match=r"has no job\.yaml"):
        find_folder(str(tmp_path))
    with pytest.raises(JobError, match=r"no folder .*gone: name the storage"):
        find_folder("tiny", str(tmp_path / "gone"))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(job.model_dump(mode="json") | {"name": "other"}))
    with pytest.raises(JobError, match=r"has no run in .* yet: `tuneyard run"):
        find_folder(str(other))
    with pytest.raises(JobError, match=f"runs with other settings: {run.name}"):
        find_folder(str(run.path.parents[2] / "job.yaml"), overrides=["train.seed=5"])


def test_a_name_that_fits_several_runs_is_refused(job: Job, run: Folder) -> None:
    twin = run.parent / "tiny-twin0000"
    twin.write_bytes("job.yaml", run.read_bytes("job.yaml"))
    try:
        with pytest.raises(JobError, match="fits several runs"):
            find_folder("tiny", job.storage)
        assert find_folder(run.name, job.storage).path == run.path
    finally:
        twin.delete()


def parsed(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return json.loads(done.stdout)


HERE = {"ledger", "plan", "status", "registry list", "doctor", "goodput", "gc", "show", "evaluate"}
ELSEWHERE = {
    "export",
    "verify",
    "sweep",
    "compare",
    "jobs list",
    "registry show",
    "registry verify",
    "registry compare",
    "registry gc",
}
"""Commands whose --json tests of their own parse."""


def test_no_command_with_json_is_forgotten() -> None:
    having = {path for path, command in COMMANDS.items() if any("--json" in param.opts for param in command.params)}
    assert {" ".join(path) for path in having} == HERE | ELSEWHERE


def test_every_json_is_json_alone_on_stdout(job: Job, run: Folder) -> None:
    job_file, storage = str(run.path.parents[2] / "job.yaml"), job.storage
    assert parsed("ledger", run.name, "--storage", storage, "--json")["splits"][0]["split"] == "train"
    assert parsed("plan", job_file, "--json")["steps"] == 6
    assert parsed("status", run.name, "--storage", storage, "--json")[0]["run"] == run.name
    assert parsed("registry", "list", "--storage", storage, "--json") == []
    assert parsed("doctor", "--storage", storage, "--json")
    assert parsed("goodput", "--nodes", "8", "--node-mtbf-hours", "1000", "--json")
    (kept,) = parsed("gc", "--storage", storage, "--json")["kept"]
    assert "did not note its own" in kept  # what `shard_locally` made has no shards.json
    assert parsed("show", job_file, "--json")[0]["tokens"]


def test_status_takes_what_every_command_takes_and_names_a_storage_that_is_not_there(job: Job, run: Folder) -> None:
    job_file = str(run.path.parents[2] / "job.yaml")
    for words in ((job_file,), (str(run),), (run.name, "--storage", job.storage)):
        assert [one["run"] for one in parsed("status", *words, "--json")] == [run.name]
    done = CliRunner().invoke(app, ["status", "--storage", f"{job.storage}-gone"])
    assert "no folder" in str(done.exception)


def test_plan_prints_its_table_and_the_whole_job_on_request(run: Folder) -> None:
    job_file = str(run.path.parents[2] / "job.yaml")
    short, full = (CliRunner().invoke(app, ["plan", job_file, *words]).stdout for words in ((), ("--full",)))
    assert "global batch" in short and "max_grad_norm" not in short and len(short.splitlines()) < 30
    assert full.startswith(short) and "max_grad_norm" in full


@pytest.mark.usefixtures("ray_session")
@pytest.mark.cluster
def test_evaluate_writes_its_progress_beside_its_json(job: Job, run: Folder) -> None:
    (record,) = parsed("evaluate", str(run), "--step", "0", "--json")
    assert record["status"] == "done" and record["step"] == 0
