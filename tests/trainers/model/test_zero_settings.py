"""DeepSpeed's settings from a model's sizes; where a model's experts lie."""

from typing import Any

import pytest
import torch
from torch import nn

from trainers.model.zero_settings import expert_blocks, with_settings, zero_settings

WIDTH, FEED, VOCABULARY = 4096, 14336, 128256


def llama(layers: int, width: int = WIDTH, feed: int = FEED, shared: int = 4) -> tuple[list[int], int]:
    """Elements of a Llama's tensors, and of a layer."""
    layer = [width**2, width**2 // shared, width**2 // shared, width**2, *[width * feed] * 3, width, width]
    return [VOCABULARY * width, *layer * layers, width], sum(layer)


def values(stage: int, tensors: list[int], layer: int, world_size: int = 8) -> dict[str, Any]:
    return {name: each.value for name, each in zero_settings(stage, tensors, layer, world_size).items()}


def test_messages_are_of_a_layer_and_every_setting_says_why() -> None:
    tensors, layer = llama(32)
    found = values(3, tensors, layer)
    assert found["reduce_bucket_size"] == found["stage3_prefetch_bucket_size"] == layer == 218_112_000
    assert found["stage3_max_live_parameters"] == 10**9
    assert all(each.reason for each in zero_settings(3, tensors, layer, 8).values())
    assert values(0, tensors, layer) == {}


def test_messages_of_tiny_and_of_giant_layers_keep_to_sizes_that_travel_well() -> None:
    assert values(3, [1000] * 10, 5000)["reduce_bucket_size"] == 25_000_000
    giant = values(3, *llama(126, 16384, 53248, 8))
    assert giant["reduce_bucket_size"] == 500_000_000
    assert giant["stage3_max_live_parameters"] == pytest.approx(6.4e9, rel=0.01), "two layers, or none comes ahead"


def test_small_tensors_stay_whole_up_to_a_hundredth_of_the_weights() -> None:
    tensors, layer = llama(32)
    adapters = [16 * WIDTH] * 224 + [16 * FEED] * 96
    assert values(3, tensors, layer)["stage3_param_persistence_threshold"] == 100_000
    assert values(3, tensors + adapters, layer)["stage3_param_persistence_threshold"] == 16 * FEED
    assert values(3, [1000] * 10, 5000)["stage3_param_persistence_threshold"] == 100_000


def test_uses_are_looked_for_unless_no_weight_is_let_go() -> None:
    name, linear = "stage3_max_reuse_distance", nn.Linear(4, 4)
    assert values(3, [1000] * 10, 5000)[name] == 0
    assert name not in values(3, *llama(32)) and name not in values(2, [1000] * 10, 5000)
    for own in ("param_persistence_threshold", "stage3_model_persistence_threshold"):
        given = {"zero_optimization": {"stage": 3, own: 0}}
        assert name not in with_settings(given, linear, 2)["zero_optimization"]


@pytest.mark.parametrize(("world_size", "together"), [(8, False), (8192, True)])
def test_ranks_get_their_parts_alone_unless_those_are_small(world_size: int, together: bool) -> None:
    assert values(2, *llama(32), world_size=world_size)["use_multi_rank_bucket_allreduce"] is together


def test_what_a_file_says_stays_by_either_name_and_auto_is_filled_in() -> None:
    given = {"stage": 3, "prefetch_bucket_size": 7, "stage3_max_live_parameters": 8, "reduce_bucket_size": "auto"}
    found = with_settings({"zero_optimization": given, "steps": 1}, nn.Linear(4, 4), 2)
    zero = found["zero_optimization"]
    assert (zero["prefetch_bucket_size"], zero["stage3_max_live_parameters"], found["steps"]) == (7, 8, 1)
    assert "stage3_prefetch_bucket_size" not in zero
    assert zero["reduce_bucket_size"] == 25_000_000
    assert zero["stage3_param_persistence_threshold"] == 100_000


class OneByOne(nn.Module):  # type: ignore[misc]
    """Experts as modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(4))


class Stack(nn.Module):  # type: ignore[misc]
    """Layers beside tables that have a row for each of something else."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(30, 8)
        self.layers = nn.ModuleList(block() for _ in range(3))


def test_experts_are_found_by_their_shapes() -> None:
    model = Stack(OneByOne)
    assert expert_blocks(model) == list(model.layers)
    assert expert_blocks(Stack(lambda: nn.Linear(8, 8))) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("mixtral", "MixtralSparseMoeBlock"),
        ("olmoe", "OlmoeSparseMoeBlock"),
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
        ("deepseek_v3", "DeepseekV3MoE"),
        ("gpt_oss", "GptOssMLP"),
        ("switch_transformers", "SwitchTransformersSparseMLP"),
        ("llama", None),
        ("bert", None),
        ("gpt2", None),
        ("mamba", None),
        ("t5", None),
    ],
)
def test_families_with_experts(family: str, block: str | None) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family)
    config.num_hidden_layers = 4
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert {type(each).__name__ for each in expert_blocks(model)} == ({block} if block else set())


def test_weights_by_heads_are_no_experts() -> None:
    """An attention whose weights are [width, heads, head], beside feed-forward layers with as many rows."""
    from transformers import XLNetConfig, XLNetModel

    assert expert_blocks(XLNetModel(XLNetConfig(vocab_size=32, d_model=32, n_layer=1, n_head=4, d_inner=64))) == []
