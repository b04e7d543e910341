"""Which layers of a family get adapters, and what becomes of them in an export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.architectures.single import Samples
from tests.trainers.test_architecture import model_of
from trainers.architecture import linear_layers, transposed_weights
from trainers.errors import JobError
from trainers.job.sections import LoraSection
from trainers.model.lora import add_adapters, merged_reader
from trainers.tasks import load_task


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    torch.set_num_threads(1)
    return Samples(tmp_path_factory.mktemp("samples"), "own")


def test_adapters_find_convolutions_that_are_linear_layers_and_merge_their_transposed_weights(samples: Samples) -> None:
    task = load_task("pretrain")
    model = model_of("gpt2", samples, task)
    with pytest.raises(JobError, match=r"q_proj.*c_attn, c_fc, c_proj"):
        add_adapters(model, LoraSection(target_modules=("q_proj",)), task)
    assert {name.split(".")[-1] for name in linear_layers(model)} == {"c_attn", "c_fc", "c_proj"}
    transposed, lora = transposed_weights(model), LoraSection(rank=2)
    adapted = add_adapters(model, lora, task)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        reference = adapted(ids).logits
    weights = {name: parameter.detach() for name, parameter in adapted.named_parameters()}
    read = merged_reader({name: list(w.shape) for name, w in weights.items()}, weights.__getitem__, lora, transposed)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(samples.folder / "models" / "gpt2").eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(read(name))
        assert torch.allclose(plain(ids).logits, reference, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid", "qwen3_next"])
def test_no_adapter_goes_where_a_kernel_takes_the_weight_past_it(samples: Samples, family: str) -> None:
    """The output projection of Mamba's mixer; that of Qwen3-Next's is called as a layer."""
    task = load_task("pretrain")
    adapted = add_adapters(model_of(family, samples, task), LoraSection(rank=2), task)
    targets = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    mixers = {
        name.split(".")[-1] for name in targets if ".mixer." in name or ".mamba." in name or "linear_attn" in name
    }
    assert "in_proj" in mixers or "in_proj_qkvz" in mixers
    assert ("out_proj" in mixers) == (family == "qwen3_next")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "llama4_text", "phimoe", "falcon"])
def test_adapters_stand_beside_linear_layers_alone(samples: Samples, family: str) -> None:
    """Not beside the experts of a mixture, whose dense layers have the names that they once had, nor beside a router
    that chooses experts by itself."""
    task = load_task("pretrain")
    model = model_of(family, samples, task)
    linear = linear_layers(model)
    adapted = add_adapters(model, LoraSection(rank=2), task)
    adapted(torch.arange(5, 12)[None])
    factors = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert factors == {f"base_model.model.{name}.lora_{part}.default.weight" for name in linear for part in "AB"}


def test_names_of_layers_that_cannot_have_adapters_are_refused(samples: Samples) -> None:
    """One that matches is no excuse for one that does not."""
    task = load_task("pretrain")
    model = model_of("mixtral", samples, task)
    with pytest.raises(JobError, match=r"gate_up_proj match no linear layer.*k_proj, o_proj, q_proj, v_proj"):
        add_adapters(model, LoraSection(target_modules=("q_proj", "gate_up_proj")), task)
