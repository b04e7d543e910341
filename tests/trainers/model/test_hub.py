"""A model with a hub id is downloaded once, to storage, where every node finds it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, serve_hub
from tests.tiny import film_rows, make_bert, tiny_job
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.source import find_teacher

NODE = """
import json, sys
from trainers.job.schema import Job
from trainers.model.source import find_model, find_teacher
job = Job.model_validate_json(sys.argv[1])
model = find_model(job)
print(json.dumps([model.path, model.digest, find_teacher(job)]))
"""


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    return make_bert(tmp_path / "model", tiny_tokenizer)


def hub_job(folder: Path) -> Job:
    distill = {"distill": {"teacher": "acme/tiny"}}
    job: Job = tiny_job(folder, Path("acme/tiny"), "classify", film_rows(10), train=distill)
    return job


def node(job: Job, hub: Hub, home: Path) -> subprocess.Popen[bytes]:
    """A process with a cache of its own, as on another node."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen([sys.executable, "-c", NODE, job.model_dump_json()], stdout=-1, stderr=-1, env=environment)


def found(process: subprocess.Popen[bytes]) -> Any:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return json.loads(out.splitlines()[-1])


def test_nodes_at_once_download_each_file_once_and_later_ones_none(tmp_path: Path, model: Path) -> None:
    job = hub_job(tmp_path)
    with serve_hub(model) as hub:
        first, second = [found(one) for one in [node(job, hub, tmp_path / name) for name in ("first", "second")]]
        assert sorted(hub.sent) == sorted(file.name for file in model.iterdir())
        path, _, teacher = first
        assert first == second and path == teacher and Path(path).parent == Path(job.storage) / "models"
        assert (Path(path) / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        hub.commit, sent = "2" * 40, len(hub.sent)  # the branch moves on, and this job does not
        assert found(node(job, hub, tmp_path / "third")) == first and len(hub.sent) == sent


def test_the_code_of_a_model_comes_with_it_where_the_job_trusts_it(tmp_path: Path, model: Path) -> None:
    (model / "own.py").write_text("# a model's own code\n")
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with serve_hub(model) as hub:
        for trusts in (False, True):
            job = hub_job(tmp_path / str(trusts))
            job = job.model_copy(update={"model": job.model.model_copy(update={"trust_remote_code": trusts})})
            path, _, _ = found(node(job, hub, tmp_path / f"home {trusts}"))
            assert (Path(path) / "own.py").is_file() == trusts
        assert not [name for name in hub.sent if "consolidated" in name], "a second copy of the weights"


def test_without_a_network_the_user_s_own_cache_goes_to_storage(tmp_path: Path, model: Path) -> None:
    snapshots, job = tmp_path / "home" / "hub" / "models--acme--tiny", hub_job(tmp_path)
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("1" * 40)
    (snapshots / "snapshots").mkdir()
    model.rename(snapshots / "snapshots" / ("1" * 40))
    path, _, teacher = found(node(job, Hub(model, "http://127.0.0.1:9"), tmp_path / "home"))
    assert path == teacher and Path(path).parent == Path(job.storage) / "models"


def test_a_teacher_that_is_not_there_is_found_before_launch(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"train\.distill\.teacher: 'acme/tiny' .* is neither a folder here nor"):
        find_teacher(hub_job(tmp_path))
