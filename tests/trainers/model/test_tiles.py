"""Feed-forward layers in tiles: losses, gradients and weights are those of whole layers, and less is held."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.architectures.single import Samples
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import train_all, with_
from trainers.architecture import feed_forward_layers
from trainers.errors import JobError, TrainingError
from trainers.job.sections import LoraSection
from trainers.model import tiles
from trainers.model.model_size import Live, measure_size
from trainers.tasks import Example, TaskOptions, load_task
from trainers.verification.tiles import check_tiles

FOUND = {"llama": 2, "gpt2": 2, "gpt_neox": 2, "phi3": 2, "apertus": 2, "cohere2": 2, "starcoder2": 2, "deepseek_v3": 1,
         "gemma3": 3, "gpt_bigcode": 2}  # fmt: skip
"""Feed-forward layers by family; one of two where the other is a mixture of experts."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    torch.set_num_threads(1)
    return Samples(tmp_path_factory.mktemp("samples"), "own")


def model_of(family: str, samples: Samples) -> Any:
    return load_task("pretrain").load_model(str(samples.model(family)), 0, False, dtype=torch.float32)


@pytest.mark.parametrize("family", FOUND)
def test_loss_and_gradients_are_those_of_whole_layers(
    family: str, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 10)
    task, draw = load_task("pretrain", TaskOptions(packing=True)), np.random.default_rng(0)
    rows = [Example(at, draw.integers(5, 30, size).astype(np.int32), {}) for at, size in enumerate((16, 9, 14))]
    batch = task.collate([rows[:2], rows[2:]], 0)
    model = model_of(family, samples).eval()
    found = []
    for tiled in (False, True):
        if tiled:
            tiles.tile_feed_forward(model)
        loss = task.step_loss(model, *batch.to("cpu"))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        found.append(
            [loss, *(slope for slope in torch.autograd.grad(loss, trained, allow_unused=True) if slope is not None)]
        )
    assert len(feed_forward_layers(model)) == FOUND[family] == len(tiles.tiled_layers(model))
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "mamba2"])
def test_a_model_without_such_layers_is_refused(family: str, samples: Samples) -> None:
    with pytest.raises(JobError, match=r"train\.feed_forward_tiles: no feed-forward layers .* leave it out"):
        tiles.tile_feed_forward(model_of(family, samples))


def test_dropout_is_drawn_alike_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the gradient were that of another loss; and what is drawn afterwards does not depend on the tiles."""
    monkeypatch.setattr(tiles, "TILE", 4)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)).double()
    states = torch.randn(1, 11, 3, dtype=torch.float64)

    def loss(given: Any) -> Any:
        torch.manual_seed(5)
        return tiles._in_tiles(layer, layer.forward)(given).square().sum()

    given = states.clone().requires_grad_()
    loss(given).backward()
    before = torch.get_rng_state()
    loss(given)
    assert torch.get_rng_state().equal(before)
    step = 1e-6 * torch.randn_like(states)
    slope = (loss(states + step) - loss(states - step)) / 2
    assert float((given.grad * step).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_a_layer_in_tiles_holds_little_beside_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 64)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    states = torch.randn(1, 4096, 8, requires_grad=True)
    peaks = []
    for run in (layer.forward, tiles._in_tiles(layer, layer.forward)):
        with Live() as live:
            run(states).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] / 5, "4 of 64 + 8 values a position"


class Mixing(torch.nn.Module):
    """Looks like a feed-forward layer, and mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, states: Any) -> Any:
        """[batch, seq, 8]"""
        return self.down(self.up(states - states.mean(1, keepdim=True)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_mixes_positions_ends_the_run_before_its_first_step(dtype: str) -> None:
    layer = Mixing().to(getattr(torch, dtype))
    layer.forward, layer.untiled = tiles._in_tiles(layer, layer.forward), layer.forward  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="Mixing does not look at each position by itself"):
        check_tiles(torch.nn.Sequential(layer), 8, dtype, torch.device("cpu"))
    del layer.untiled
    check_tiles(torch.nn.Sequential(layer), 8, dtype, torch.device("cpu"))


def in_small_tiles(plan: list[tuple[Any, str, int | None]]) -> list[dict[int, float]]:
    tiles.TILE = 50
    return train_all(plan)


@pytest.mark.slow
def test_ranks_train_alike_with_tiles_in_every_way(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "sft", chat_rows(40), data={"max_length": 200}, train={"steps": 2})
    shard_locally(job)
    again = with_(job, train={"activation_checkpointing": "full"})
    ways = {"zero0": job, "zero2": again, "zero3": job,
            "zero3-cpu-offload": with_(again, model={"lora": LoraSection(rank=2)})}  # fmt: skip
    jobs = {name: with_(each, train={"deepspeed": name}) for name, each in ways.items()}
    tiled = {name: with_(each, train={"feed_forward_tiles": True}) for name, each in jobs.items()}
    plan = [(each, f"{name}-{kind}", None) for kind, some in (("whole", jobs), ("tiled", tiled))
            for name, each in some.items()]  # fmt: skip
    found = run_ranks(in_small_tiles, 2, plan)[0]
    for name, whole, parts in zip(ways, found[: len(ways)], found[len(ways) :], strict=True):
        assert whole and parts == pytest.approx(whole, abs=1e-5), name


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)])
def test_the_plan_knows_that_tiles_take_less_with_adapters_too(
    tmp_path: Path, tiny_chat_tokenizer: Path, lora: LoraSection | None
) -> None:
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "pretrain", [{"text": "a"}] * 5, data={"max_length": 4 * tiles.TILE})
    size = measure_size(with_(job, model={"lora": lora}), str(model))
    assert 0 < size.tiled_layer_bytes < size.layer_bytes and size.tile_bytes > 0
