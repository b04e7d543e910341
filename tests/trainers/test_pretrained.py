"""A model begins with the weights of its folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.architectures.single import Samples
from tests.trainers.test_architecture import model_of
from trainers.errors import JobError
from trainers.tasks import load_task

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    torch.set_num_threads(1)
    return Samples(tmp_path_factory.mktemp("samples"), "own")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "nemotron", "falcon", "mixtral", "bert"])
def test_a_head_whose_class_calls_the_body_otherwise_has_the_pretrained_body(samples: Samples, family: str) -> None:
    model = model_of(family, samples, load_task("extract"))
    path = samples.folder / "models" / family
    plain: Any = transformers.AutoModel.from_pretrained(path)
    body = getattr(model, model.base_model_prefix)
    weights = dict(plain.named_parameters())
    for name, parameter in body.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_folder_without_the_bodys_weights_is_refused(samples: Samples, tmp_path: Path) -> None:
    path = shutil.copytree(samples.model("llama"), tmp_path / "model")
    layers = {name: tensor for name, tensor in load_file(path / WEIGHTS).items() if "layers" in name}
    save_file({f"other.{name.replace('layers', 'blocks')}": tensor for name, tensor in layers.items()}, path / WEIGHTS)
    with pytest.raises(JobError, match=r"none of the 20 weights of LlamaForQuestionAnswering's body"):
        load_task("extract").load_model(str(path), pad_id=0, trust_remote_code=False)
