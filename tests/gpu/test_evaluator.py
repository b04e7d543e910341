"""A warm evaluator on GPUs: what it leaves there between two evaluations, and on which it computes."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluation.task import score
from tests.gpu import MARKS, has_gpu
from tests.orchestrator.evaluation.test_one_gpu import evaluate_thrice
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.evaluation.test_warm import changed
from trainers.evaluation import warm
from trainers.model import world
from trainers.run.record import find_run

pytestmark = MARKS
WORKSPACE = 64 * 2**20
"""That of cuBLAS, which stays: 32 MiB on Hopper."""


def test_between_two_evaluations_nothing_is_on_the_device_and_each_takes_its_own(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all GPUs in turn, twice."""
    import torch

    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(100))
    shard_locally(job)
    run = find_run(job)
    paths = [str(changed(run, tmp_path / f"step-{seed}", seed)) for seed in (1, 2)]
    monkeypatch.setattr(world, "_claimed", [])
    gpus = list(range(torch.cuda.device_count())) or [0]
    said: dict[str, list[float]] = {path: [] for path in paths}
    for gpu in (*gpus, *gpus):
        world.claim_gpu(gpu)
        for path in paths:
            said[path].append(np.concatenate([one["loss_sum"] for one in score(run, path, 0)[""].numbers]).sum())
            ((loaded, _),) = warm._kept.values()
            assert {value.device.type for value in loaded.model.state_dict().values()} == {"cpu"}
            if has_gpu():
                assert loaded.device == torch.device("cuda", gpu) and torch.cuda.current_device() == gpu
                assert max(torch.cuda.memory_reserved(one) for one in gpus) <= WORKSPACE
    assert all(values == pytest.approx([values[0]] * len(values), rel=1e-4) for values in said.values())
    warm._kept.clear()


def test_a_process_of_ray_evaluates_twice_on_the_gpus_that_it_is_given(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """And leaves them when nothing comes."""
    found = evaluate_thrice(tmp_path, tiny_tokenizer, 0 if has_gpu() else 2)["evaluations"]
    if has_gpu():
        assert all(one["device"] == f"cuda:{one['claimed']}" for one in found)
