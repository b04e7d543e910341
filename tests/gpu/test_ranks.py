"""Ranks on GPUs: the same runs as on CPU, over NCCL, with the kernels that only GPUs have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import MARKS, has_gpu
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import train_all, with_
from trainers.architecture.document_attention import attend

pytestmark = MARKS
WAYS = ("zero0", "zero2", "zero3", "zero3-cpu-offload")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Any:
    """A job in bf16 on packed chats, whose heads are as wide as the flash kernel wants them."""
    folder = tmp_path_factory.mktemp("gpu")
    model = make_llama(folder / "model", tiny_chat_tokenizer, hidden_size=96, num_attention_heads=3)
    options = {"data": {"max_length": 256}, "train": {"global_batch_size": 4}}
    job = tiny_job(folder, model, "sft", chat_rows(60), **options)
    shard_locally(job)
    return with_(job, model={"dtype": "bfloat16", "attention": "documents"})


@pytest.fixture(scope="module")
def losses(bf16: Any) -> dict[tuple[str, str], dict[int, float]]:
    """By way and run: undisturbed twice, and stopped after three steps and resumed; all of it deterministic."""
    plan = {}
    for way in WAYS:
        job = with_(bf16, train={"deepspeed": way, "deterministic": True})
        for run, stop in (("whole", None), ("twice", None), ("again", 3), ("resumed", None)):
            folder = f"{way}-{'again' if run == 'resumed' else run}"
            plan[way, run] = (job, folder, stop)
    plan["compiled", "whole"] = (with_(bf16, train={"deepspeed": "zero0", "compile": True}), "compiled", None)
    world = min(torch.cuda.device_count(), 2) if has_gpu() else 1
    return dict(zip(plan, run_ranks(train_all, world, list(plan.values()))[0], strict=True))


@pytest.mark.parametrize("way", (*WAYS, "compiled"))
def test_bf16_trains_on_gpus(losses: dict[tuple[str, str], dict[int, float]], way: str) -> None:
    whole = losses[way, "whole"]
    assert whole[6] < whole[1]
    assert whole == pytest.approx(losses["zero0", "whole"], abs=2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_give_the_same_bits(losses: dict[tuple[str, str], dict[int, float]], way: str) -> None:
    assert losses[way, "whole"] == losses[way, "twice"]


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_gives_the_bits_of_an_undisturbed_one(
    losses: dict[tuple[str, str], dict[int, float]], way: str
) -> None:
    assert losses[way, "again"] | losses[way, "resumed"] == losses[way, "whole"]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 2, 64), (9, 3, 96), (4, 4, 256)])
def test_the_flash_kernel_by_bounds_gives_what_documents_alone_give(
    heads: int, shared: int, width: int, window: int | None
) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if has_gpu() else "cpu")
    bounds = torch.tensor([0, 1, 130, 131, 700, 1024, 1024, 1024], dtype=torch.int32, device=device)

    def compute(dtype: torch.dtype) -> list[torch.Tensor]:
        """Output and gradients."""
        leaves = [state.to(dtype).requires_grad_() for state in states]
        output, _ = attend(None, *leaves, None, scaling=width**-0.5, sliding_window=window,
                           cu_seq_lens_q=bounds, max_length_q=1024)  # fmt: skip
        return [output, *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    states = [torch.randn(1, count, 1024, width, device=device) for count in (heads, shared, shared)]
    states = [state.bfloat16() for state in states]
    upstream = torch.randn(1, 1024, heads, width, device=device).bfloat16()
    for half, whole in zip(compute(torch.bfloat16), compute(torch.float32), strict=True):
        assert float((half.float() - whole).norm() / whole.norm()) < 1e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_and_its_gradient_are_those_of_torch(dtype: torch.dtype, smoothing: float) -> None:
    if not has_gpu():
        pytest.skip("the kernel runs on GPUs alone")
    from trainers.tasks.losses.fused import loss_and_slope

    torch.manual_seed(0)
    for vocabulary in (100, 8192, 128_257):
        logits = (3 * torch.randn(33, vocabulary, device="cuda")).to(dtype)
        labels = torch.randint(0, vocabulary, (33,), device="cuda")
        leaf = logits.double().requires_grad_()
        wanted = torch.nn.functional.cross_entropy(leaf, labels, label_smoothing=smoothing, reduction="sum")
        wanted.backward()
        loss, slope = loss_and_slope(logits, labels, smoothing)
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert slope.dtype == dtype
        assert float((slope.double() - leaf.grad).norm() / leaf.grad.norm()) < (
            1e-5 if dtype == torch.float32 else 4e-3
        )
