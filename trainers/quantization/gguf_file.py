"""Writes an exported model as one GGUF file in Q8_0, by the gguf package's writer and quantizer, a tensor at a time.

Blocks of 32 values with one fp16 scale each (ggml's `block_q8_0`); vectors stay fp32; rows that are no multiple of 32
long are fp16. Keys as llama.cpp reads them: sizes, rope, the tokenizer with its chat template.
"""

import json
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trainers.architecture import PART, GgmlModel, ggml_model, ggml_obstacle
from trainers.errors import EvaluationError, JobError
from trainers.quantization.exported import exported_weights
from trainers.records import Array
from trainers.tokenizer.gguf_vocabulary import add_vocabulary, read_split

MOSTLY_Q8_0 = 7
"""`general.file_type`."""
ROPE_FREQUENCIES = "rope_freqs.weight"


def check_gguf(config: Any, head: str, model_path: Path) -> None:
    """See that a model can be written. Raises JobError where it cannot."""
    obstacle = ggml_obstacle(config)
    if head != "AutoModelForCausalLM":
        obstacle = f"it writes causal models, and this task's are {head}"
    if obstacle:
        raise JobError(f"--quantize q8_0: {obstacle}; take int8 or fp8, or export the model unquantized")
    read_split(model_path)


def write_gguf(source: Path, out: Path, config: Any, name: str) -> None:
    """Write a folder's weights and tokenizer as one file.

    Args:
        source: an exported folder.
        config: its configuration.
        name: what the file calls the model.

    Raises:
        EvaluationError: where a weight has no name in GGUF.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    model = ggml_model(config)
    arch = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == model.architecture)
    names = get_tensor_name_map(arch, model.block_count)
    generation = source / "generation_config.json"
    stops = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    with ExitStack() as opened:
        weights = exported_weights(source, opened)
        writer = GGUFWriter(out, model.architecture)
        opened.callback(writer.close)
        _add_sizes(writer, model, name)
        add_vocabulary(writer, source, model.vocabulary, stops if isinstance(stops, list) else [])
        tensors: dict[str, str] = {}
        for weight in weights:
            known = names.get_name(weight, (".weight", ".bias"))
            if known is None:
                raise EvaluationError(f"{weight} has no name in a GGUF file of {model.architecture}")
            tensors[known] = weight
        kinds = {known: _announce(writer, known, weights[weight]()) for known, weight in tensors.items()}
        divisors = model.rope_divisors
        if divisors is not None:
            writer.add_tensor_info(ROPE_FREQUENCIES, divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for known, weight in tensors.items():
            writer.write_tensor_data(_stored(model.rows(known, weights[weight]()), kinds[known]))
        if divisors is not None:
            writer.write_tensor_data(divisors)


def _add_sizes(writer: Any, model: GgmlModel, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, RopeScalingType

    writer.add_name(name)
    writer.add_file_type(MOSTLY_Q8_0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(model.block_count)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.embedding_length)
    writer.add_feed_forward_length(model.feed_forward_length)
    writer.add_head_count(model.head_count)
    writer.add_head_count_kv(model.head_count_kv)
    writer.add_key_length(model.head_length)
    writer.add_value_length(model.head_length)
    writer.add_layer_norm_rms_eps(model.rms_epsilon)
    writer.add_rope_dimension_count(model.head_length)
    writer.add_rope_freq_base(model.rope_base)
    if model.rope_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_factor)


def _announce(writer: Any, name: str, tensor: Any) -> Any:
    """Say what a tensor will be, before any is written. Returns its type."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    stored = tuple(tensor.shape)
    if len(stored) == 1:
        kind, dtype = GGMLQuantizationType.F32, "float32"
    elif stored[-1] % 32:
        kind, dtype = GGMLQuantizationType.F16, "float16"
    else:
        kind, dtype = GGMLQuantizationType.Q8_0, "uint8"
        stored = tuple(quant_shape_to_byte_shape(stored, kind))
    writer.add_tensor_info(name, stored, np.dtype(dtype), prod(stored) * np.dtype(dtype).itemsize, kind)
    return kind


def _stored(tensor: Any, kind: Any) -> Array:
    """The stored form of a tensor, made of some rows at a time."""
    from gguf import quantize

    if tensor.ndim == 1:
        values: Array = tensor.float().numpy()
        return values
    count = max(PART // tensor.shape[-1], 1)
    parts = [quantize(tensor[start : start + count].float().numpy(), kind) for start in range(0, len(tensor), count)]
    return np.concatenate(parts)
