"""Writes safetensors as a stream: one tensor in memory at a time, digested on the way, to any storage.

The safetensors library writes a whole dictionary at once; a checkpoint or an export should not need that much memory.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, raw little-endian data).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import xxhash

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
TORCH_NAMES = {name: torch for torch, name in DTYPES.items()}
WIDTHS = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor that is written later."""

    name: str
    dtype: str
    """As torch names it, without the prefix: float32."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * WIDTHS[DTYPES[self.dtype]]


@dataclass(frozen=True)
class FileLayout:
    """Where everything of a safetensors file lies, before there is any value."""

    header: bytes
    offsets: dict[str, int]
    """First byte of each tensor, counted from the start of the file."""
    num_bytes: int
    """Size of the whole file."""


@dataclass(frozen=True)
class FileDigest:
    """Size and xxh3-128 of a whole file."""

    bytes: int
    digest: str


def spec_of(name: str, tensor: Any) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def plan_file(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out the file that `write_tensors` would write."""
    ordered = _in_file_order(specs)
    header = _header(ordered, metadata)
    offsets, end = {}, len(header)
    for spec in ordered:
        offsets[spec.name] = end
        end += spec.num_bytes
    return FileLayout(header, offsets, end)


def _in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wide types first, which keeps every tensor aligned."""
    return sorted(specs, key=lambda spec: (-WIDTHS[DTYPES[spec.dtype]], spec.name))


def write_tensors(
    stream: Any, specs: Iterable[TensorSpec], load: Callable[[str], Any], metadata: Mapping[str, str]
) -> FileDigest:
    """Write a safetensors file to an open stream.

    Args:
        load: gives the tensor of a name, on any device; called once each, in file order.

    Raises:
        ValueError: where a tensor is not what its spec said.
    """
    return write_parts(stream, specs, lambda name: (load(name),), metadata)


def write_parts(
    stream: Any, specs: Iterable[TensorSpec], parts: Callable[[str], Iterable[Any]], metadata: Mapping[str, str]
) -> FileDigest:
    """Write a safetensors file of which not even one tensor need be in memory as a whole.

    Args:
        parts: gives the tensor of a name in consecutive parts of its values; called once each, in file order.

    Raises:
        ValueError: where the parts are not what the spec said.
    """
    digest = xxhash.xxh3_128()
    written = 0
    for chunk in file_chunks(specs, parts, metadata):
        digest.update(chunk)
        stream.write(chunk)
        written += len(chunk)
    return FileDigest(written, digest.hexdigest())


def file_chunks(
    specs: Iterable[TensorSpec], parts: Callable[[str], Iterable[Any]], metadata: Mapping[str, str]
) -> Iterator[memoryview]:
    """The bytes of a safetensors file; arguments as of `write_parts`."""
    ordered = _in_file_order(specs)
    yield memoryview(_header(ordered, metadata))
    for spec in ordered:
        given = 0
        for part in parts(spec.name):
            dtype = str(part.dtype).removeprefix("torch.")
            given += part.nbytes
            if dtype != spec.dtype or given > spec.num_bytes:
                raise ValueError(f"{spec.name} is {dtype} {tuple(part.shape)}, announced as {spec}")
            if part.nbytes:
                yield memoryview(part.detach().cpu().contiguous().flatten().view(dtype=_uint8()).numpy()).cast("B")
        if given != spec.num_bytes:
            raise ValueError(f"{spec.name} has {given} bytes, announced as {spec}")


def _uint8() -> Any:
    import torch

    return torch.uint8


def _header(specs: list[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        span = [offset, offset + spec.num_bytes]
        entries[spec.name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset = span[1]
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
