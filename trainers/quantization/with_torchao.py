"""Writes an exported model's linear layers as int8 or fp8 weights by torchao, a tensor at a time, as safetensors.

Weights alone: one fp32 scale a row; activations stay in the model's type, so no calibration is needed and any device
that torch knows runs it. Which layers: transformers' own choice, every linear layer but the output embedding. The form
is torchao's own for safetensors, which transformers loads; no pickle.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainers.architecture import Weight, published_weights, whole, write_weights
from trainers.errors import JobError
from trainers.quantization.exported import exported_weights
from trainers.storage import Folder
from trainers.tensor_file import spec_of


def check_torchao(empty: Any, form: str, trust_remote_code: bool) -> None:
    """See that a model can be quantized.

    Args:
        empty: the model on the meta device.

    Raises:
        JobError: where torchao is missing, or the model has code or layers of its own.
    """
    if find_spec("torchao") is None:
        raise JobError(f"--quantize {form} needs torchao: pip install 'tuneyard[quantize]'")
    if trust_remote_code:
        raise JobError(f"--quantize {form} knows transformers' own models alone, this one brings its own code")
    meta = {name: Weight(spec_of(name, weight), lambda: None, lambda: iter(())) for name, weight in
            empty.named_parameters()}  # fmt: skip
    other = sorted(set(published_weights(empty, meta)) - meta.keys())
    if other:
        raise JobError(
            f"--quantize {form}: transformers holds this model otherwise than it is published ({other[0]}), as it does "
            "mixtures of experts, and quantizes no experts: nothing would be gained"
        )
    if not quantized_layers(empty, form):
        raise JobError(f"--quantize {form}: {type(empty).__name__} has no linear layer that torchao quantizes")


def quantized_layers(empty: Any, form: str) -> set[str]:
    """Names of the weights that transformers would quantize."""
    quantizer = _quantizer(form)
    quantizer._process_model_before_weight_loading(empty)
    return {name for name, _ in empty.named_parameters() if quantizer.param_needs_quantization(empty, name)}


def _settings(form: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2) if form == "int8" else Float8WeightOnlyConfig()


def _quantizer(form: str) -> Any:
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    return TorchAoHfQuantizer(TorchAoConfig(_settings(form)))


def write_quantized(source: Path, out: Path, empty: Any, form: str) -> None:
    """Write a folder's weights, those of linear layers quantized, and its configuration.

    Args:
        source: an exported folder.
        out: a folder.
        empty: the model on the meta device.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    layers = quantized_layers(empty, form)
    metadata: dict[str, str] = {"format": "pt"}
    told: list[str] = []
    with ExitStack() as opened:
        weights: dict[str, Weight] = {}
        for name, read in exported_weights(source, opened).items():
            example = read().to("meta")
            flat, about = flatten_tensor_state_dict(
                {name: quantize_weight(example, form) if name in layers else example}
            )
            told += json.loads(about.pop("tensor_names"))
            metadata |= about
            load = partial(_flattened, name, read, form) if name in layers else read
            for part, tensor in flat.items():
                one = _part(load, part) if name in layers else load
                weights[part] = Weight(spec_of(part, tensor), one, whole(one))
        metadata["tensor_names"] = json.dumps(told)
        write_weights(weights, Folder(str(out)), metadata)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _quantizer(form).quantization_config.to_dict()
    Folder(str(out)).write_json("config.json", config)


def quantize_weight(weight: Any, form: str) -> Any:
    """A linear layer's weight, [out, in], quantized by torchao; of a weight on the meta device its form alone."""
    import torch
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(layer, _settings(form))
    return layer.weight


def _flattened(name: str, read: Callable[[], Any], form: str) -> Mapping[str, Any]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    flat: Mapping[str, Any] = flatten_tensor_state_dict({name: quantize_weight(read(), form)})[0]
    return flat


def _part(load: Callable[[], Mapping[str, Any]], part: str) -> Callable[[], Any]:
    return lambda: load()[part]
