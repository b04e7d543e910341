"""Smoke tests for GPUs: the same runs as on CPU, over NCCL. Skipped where there is no CUDA device."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import train_all, with_


def gpus() -> int:
    """CUDA devices here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no CUDA device"),
]


@pytest.mark.parametrize("template", ["zero3", "zero2", "zero3-cpu-offload"])
def test_bf16_trains_and_resumes_on_gpus(tmp_path: Path, tiny_chat_tokenizer: Path, template: str) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(
        tmp_path,
        model,
        "sft",
        chat_rows(60),
        data={"max_length": 256},
        train={"global_batch_size": 4, "deepspeed": template},
    )
    shard_locally(job)
    bf16 = with_(job, model={"dtype": "bfloat16"})
    plan = [(bf16, "whole", None), (bf16, "again", 3), (bf16, "again", None)]
    whole, stopped, resumed = run_ranks(train_all, min(gpus(), 2), plan)[0]
    assert whole[6] < whole[1]
    assert stopped | resumed == pytest.approx(whole, abs=2e-2)
