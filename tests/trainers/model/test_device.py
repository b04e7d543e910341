"""`gpus_per_worker: 0` means the CPU in every part that computes, on a machine with GPUs too."""

import os
from pathlib import Path

import pytest
import torch

from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.errors import JobError
from trainers.evaluation.evaluate import evaluate_model
from trainers.evaluation.predict import predict
from trainers.job.schema import Job
from trainers.model import world
from trainers.model.source import prepare_model
from trainers.model.world import check_gpus, join_world, pick_device
from trainers.run.record import find_run
from trainers.verification.verify import verify_job


@pytest.fixture
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says there are two GPUs; where it has no CUDA, all that goes to one fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def job(tmp_path: Path, tiny_tokenizer: Path) -> Job:
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    made: Job = tiny_job(tmp_path, model, "classify", film_rows(20), scale={"gpus_per_worker": 0})
    shard_locally(made)
    return made


@pytest.mark.usefixtures("_gpus")
def test_the_gpu_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(pick_device("auto")) == str(pick_device(1)) == "cuda:1"
    assert str(pick_device(0)) == "cpu"


@pytest.mark.usefixtures("_gpus")
def test_a_rank_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    contract = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"}
    for name, value in {**contract, "CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cuda"}.items():
        monkeypatch.setenv(name, value)
    assert str(join_world(torch.get_num_threads(), 0).device) == "cpu"
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"]) == ("", "cpu")


def test_a_rank_does_not_take_the_cpu_in_silence_where_torch_cannot_use_the_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(world, "DRIVER", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(JobError, match=r"torch .* cannot use a GPU there: .*; install a torch that goes with the"):
        check_gpus("auto")
    check_gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the node agent has it for ranks on cores
    check_gpus("auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidiactl").unlink()
    check_gpus("auto")


def test_what_is_offloaded_is_updated_by_the_cores_that_ranks_on_gpus_leave_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr(world.World, "gather", lambda _, node: [node, node, "another node", node])
    try:
        torch.set_num_threads(1)
        world.share_cores(world.World(0, 4, torch.device("cpu")))
        assert torch.get_num_threads() == 1
        world.share_cores(world.World(0, 4, torch.device("cuda", 0)))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_gpus")
def test_evaluation_prediction_and_self_tests_stay_on_the_cpu(job: Job) -> None:
    run = find_run(job)
    task = run.load_task()
    rows, _ = evaluate_model(job, task, run.model.path, run.open_shards("eval", task))
    assert len(rows) == 4
    assert len(list(predict(job, run.model.path, [{"text": "the film"}]))) == 1
    assert not [check.detail for check in verify_job(job, prepare_model(job)).checks if check.error]
