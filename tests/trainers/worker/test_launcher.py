"""A launcher's configuration that contradicts the job is an error, not a setting that is passed over."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import film_rows, tiny_job
from trainers.errors import JobError
from trainers.worker.launcher import check_launcher

AGREEING = {
    "WORLD_SIZE": "2",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}


def job(tmp_path: Path, workers: int = 1, deepspeed: str = "zero3") -> Any:
    changes: dict[str, Any] = {"scale": {"workers": workers}, "train": {"deepspeed": deepspeed}}
    return tiny_job(tmp_path, tmp_path, "classify", film_rows(10), **changes)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("DEEPSPEED_ZERO_STAGE", "2", "zero_stage: 2, but the job means 3"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: cpu, but the job means none"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: nvme, but the job means none"),
        ("MIXED_PRECISION", "fp16", "mixed_precision: fp16, but the job means"),
        ("GRADIENT_ACCUMULATION_STEPS", "7", "gradient_accumulation_steps: 7, but the job means"),
    ],
)
def test_each_setting_that_contradicts_is_refused(tmp_path: Path, name: str, value: str, problem: str) -> None:
    assert check_launcher(job(tmp_path), AGREEING) == []
    with pytest.raises(JobError, match=problem):
        check_launcher(job(tmp_path), {**AGREEING, f"ACCELERATE_{name}": value})


def test_torchrun_says_nothing_and_its_number_of_ranks_counts(tmp_path: Path) -> None:
    assert check_launcher(job(tmp_path), {"WORLD_SIZE": "2"}) == []
    (note,) = check_launcher(job(tmp_path, workers=4), {"WORLD_SIZE": "2"})
    assert note == "scale.workers is 4, but the launcher started 2 ranks, which count"


def test_auto_decides_whatever_the_launcher_says_and_that_is_told(tmp_path: Path) -> None:
    auto = job(tmp_path, deepspeed="auto")
    assert check_launcher(auto, {"WORLD_SIZE": "2"}) == []
    (note,) = check_launcher(auto, {**AGREEING, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    assert "train.deepspeed is auto: it decides" in note
