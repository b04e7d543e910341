"""A GGUF file as a Hugging Face folder in fp32, one tensor in memory at a time. Begin at `dequantize`.

transformers reads and converts the file; here each tensor is unpacked when it is asked for, and goes to disk at once.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainers.architecture import PART, Weight, in_parts, published_weights, write_weights
from trainers.errors import JobError
from trainers.pretrained import read_offloaded, without_notice
from trainers.records import Array
from trainers.storage import Folder
from trainers.tensor_file import TensorSpec

LONG_ARRAY = 4096
"""Values of an array that only a vocabulary has; the longest of a configuration have one a layer."""
SHARD_BYTES = 50_000_000_000
"""As transformers' save_pretrained: the folder is the same, byte for byte."""


def dequantize(source: Path, gguf_file: str, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder. While it goes on it takes twice the folder's disk.

    Args:
        source: the folder of the GGUF file.
        target: an empty folder.

    Raises:
        JobError: where transformers cannot read the file, or weights of the model are not in it.
    """
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import select_tokenizer_builder
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacked-") as scratch:
        try:
            told, _ = read_gguf_metadata(str(source / gguf_file))
            select_tokenizer_builder(told["general.architecture"], told.get("tokenizer.ggml.model"))
            if "tokenizer.ggml.tokens" not in told:
                raise ValueError("it has no tokenizer.ggml.tokens")
            model, missing = _open(source, gguf_file, scratch)
        except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
            raise JobError(f"model.gguf_file: {source / gguf_file} cannot be converted: {error}") from error
        if missing:
            raise JobError(
                f"model.gguf_file: {len(missing)} weights of {type(model).__name__} are not in {source / gguf_file}: "
                f"{', '.join(sorted(missing)[:5])}. They would be drawn at random; take a whole file, or safetensors"
            )
        _write_settings(model, target)
        weights = published_weights(model, _weights(model))
        write_weights(weights, Folder(str(target)), {"format": "pt"}, SHARD_BYTES)
    del model, weights
    gc.collect()
    with _without_words():  # last: what a tokenizer takes is not given back to the system
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)


def _write_settings(model: Any, target: Path) -> None:
    """What the model's save_pretrained writes beside the weights; itself it imports DeepSpeed, which takes 65 MiB."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config.dtype, model.config.architectures = "float32", [type(model).__name__]
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)


def _open(source: Path, gguf_file: str, scratch: str) -> tuple[Any, set[str]]:
    """The model with its weights on disk, and the names of those that the file lacks."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with _to_disk(scratch), _without_words(), without_notice():
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf_file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            device_map={"": "disk"},
            offload_folder=scratch,
            output_loading_info=True,
        )
    return model, info["missing_keys"]


@contextmanager
def _to_disk(scratch: str) -> Iterator[None]:
    """transformers 5.23 refuses to put a GGUF model's weights on disk, because packed ones cannot be read from there
    again; unpacked ones can. Files of most families it unpacks whole before it begins, here one tensor at a time."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    usual: Any = AUTO_QUANTIZER_MAPPING["gguf"]

    class OnDisk(usual):  # type: ignore[misc]
        def update_device_map(self, device_map: Any) -> Any:
            return device_map

        def get_state_dict(self, file: str, model: Any) -> Any:
            return super().get_state_dict(file, model) if self.supported else _tensors(file, model, scratch)

    AUTO_QUANTIZER_MAPPING["gguf"] = OnDisk
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["gguf"] = usual


@contextmanager
def _without_words() -> Iterator[None]:
    """Within, gguf's reader keeps how many values a long array has and none of them. Of SmolLM2's 49,000 words, their
    kinds and merges it would keep two maps of each, 157 MiB; a configuration asks for their number alone."""
    import gguf

    usual: Any = gguf.GGUFReader

    class Reader(usual):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            from gguf import GGUFValueType

            is_array = raw_type == GGUFValueType.ARRAY
            count = self._get(orig_offs + 4, np.uint64) if is_array else [0]
            if count[0] <= LONG_ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, offset = self._get(orig_offs, np.uint32), orig_offs + 12
            types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
            if types[1] == GGUFValueType.STRING:
                value = np.zeros(0, np.uint8)
                for _ in range(int(count[0])):
                    offset += 8 + int(self._get(offset, np.uint64)[0])
            else:
                value = np.zeros(1, self.gguf_scalar_to_np[types[1]])
                offset += int(count[0]) * value.itemsize
            return offset - orig_offs, [kind, count, value], [2] * int(count[0]), types

    gguf.GGUFReader = Reader
    try:
        yield
    finally:
        gguf.GGUFReader = usual


class _Stored(NamedTuple):
    """A tensor of the file, mapped; its shape as torch has it."""

    name: str
    data: Array
    kind: Any
    shape: list[int]


class _Tensor:
    """A tensor that is read when its values are asked for, as transformers asks a slice of a safetensors file."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load

    def __getitem__(self, _: Any) -> Any:
        return self.load()

    def get_dtype(self) -> str:
        return "F32"


def _tensors(file: str, model: Any, scratch: str) -> dict[str, _Tensor]:
    """What transformers' `load_gguf_checkpoint` gives, by its own converters, nothing of it read yet."""
    import torch
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as library

    reader = GGUFReader(file)
    architecture = library.read_field(reader, "general.architecture")[0]
    tensors = [_Stored(each.name, each.data, each.tensor_type, each.shape.tolist()[::-1]) for each in reader.tensors]
    processor = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)(config=model.config.to_dict())
    names = library.get_gguf_hf_weights_map(model, processor)
    sources: dict[str, list[_Stored]] = {}
    for tensor in tensors:  # experts go by their name without its ending, several to one weight
        if name := names.get(tensor.name, names.get(tensor.name.removesuffix(".weight"))):
            sources.setdefault(name, []).append(tensor)

    def load(name: str) -> Any:
        found: dict[str, Any] = {}
        for tensor in sources[name]:
            done = processor.process(
                weights=_unpack(tensor, scratch),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": found},
            )
            if done.name in names:
                found[names[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights))
        return found[name]

    return {name: _Tensor(partial(load, name)) for name in sources}


def _unpack(tensor: _Stored, scratch: str) -> Array:
    """A tensor's values in fp32, some rows at a time: unpacking takes several times its room. They lie in a file
    without a name, whose pages the system can put away."""
    from gguf import dequantize

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    with tempfile.TemporaryFile(dir=scratch) as file:
        values: Array = np.memmap(file, np.float32, "w+", shape=(len(rows), tensor.shape[-1]))
    count = max(PART // tensor.shape[-1], 1)
    for start in range(0, len(rows), count):
        values[start : start + count] = dequantize(rows[start : start + count], tensor.kind)
    return values.reshape(tensor.shape)


def _weights(model: Any) -> dict[str, Weight]:
    weights = {}
    for name, parameter in model.named_parameters():
        load = partial(read_offloaded, model, name)

        def parts(load: Callable[[], Any] = load, size: int = parameter.numel()) -> Iterator[Any]:
            flat = load().flatten()
            return in_parts(lambda start, end: flat[start:end], size)

        weights[name] = Weight(TensorSpec(name, "float32", tuple(parameter.shape)), load, parts)
    return weights
