"""A model's weights under the names it is published with, any of them in parts, and how they are written.

transformers holds some models otherwise than they are published: the experts of a layer as one tensor, say. Its own
reverse conversion (`revert_weight_conversion`) gives the published tensors back, here of one tensor at a time.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainers.storage import Folder
from trainers.tensor_file import FileDigest, TensorSpec, spec_of, write_parts

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"

PART = 1 << 20
"""Values of a weight in memory at once: 4 MiB in fp32."""
KEPT = 3
"""Converted tensors that are kept: those of one layer lie next to each other in a file."""
LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One weight as the model in memory has it."""

    spec: TensorSpec
    load: Callable[[], Any]
    """The whole tensor, in the type of its spec."""
    parts: Callable[[], Iterator[Any]]
    """The same, in consecutive parts."""


def published_weights(empty: Any, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights that are published, by their published names.

    Args:
        empty: the model on the meta device.
        weights: as the model in memory has them, by name.
    """
    import torch

    weights = _saved(empty, weights)
    meta = {name: torch.empty(weight.spec.shape, dtype=getattr(torch, weight.spec.dtype), device="meta")
            for name, weight in weights.items()}  # fmt: skip
    target = _shapes(_convert(empty, meta))
    if target == _shapes(meta):
        return dict(weights)
    published: dict[str, Weight] = {}
    cache: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()
    for names in _groups(empty, meta, target):
        converted = _convert(empty, {name: meta[name] for name in names})
        if _shapes(converted) == _shapes({name: meta[name] for name in names}):
            published |= {name: weights[name] for name in names}
            continue
        for name, tensor in converted.items():
            load = _loader(empty, weights, names, name, cache)
            published[name] = Weight(spec_of(name, tensor), load, whole(load))
    return published


def _saved(empty: Any, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Without those that transformers makes anew while loading; tied ones under the name that it saves."""
    made, ties = empty._keys_to_ignore_on_save or (), getattr(empty, "all_tied_weights_keys", {})
    tied = {name: source for name, source in ties.items() if source not in weights}
    names = {name: tied.get(name, name) for name in weights if name not in made}
    return {new: replace(weights[name], spec=replace(weights[name].spec, name=new)) for name, new in names.items()}


def _loader(
    empty: Any, weights: Mapping[str, Weight], sources: tuple[str, ...], name: str, cache: OrderedDict[Any, Any]
) -> Callable[[], Any]:
    def load() -> Any:
        if sources not in cache:
            cache[sources] = _convert(empty, {source: weights[source].load() for source in sources})
            if len(cache) > KEPT:
                cache.popitem(last=False)
        return cache[sources][name]

    return load


def _convert(empty: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(empty, dict(tensors)))


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _groups(empty: Any, meta: Mapping[str, Any], target: Mapping[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Names to convert together: one at a time where that gives the same, else a layer at a time, else all."""
    singles: list[tuple[str, ...]] = [(name,) for name in meta]
    layers: dict[str, list[str]] = {}
    for name in meta:
        match = LAYER.match(name)
        layers.setdefault(match[1] if match else "", []).append(name)
    for groups in (singles, [tuple(names) for names in layers.values()]):
        if _try(empty, meta, groups) == target:
            return groups
    return [tuple(meta)]


def _try(empty: Any, meta: Mapping[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, ...]] | None:
    shapes: dict[str, tuple[int, ...]] = {}
    for names in groups:
        try:
            shapes |= _shapes(_convert(empty, {name: meta[name] for name in names}))
        except Exception:  # a conversion that lacks a tensor raises whatever it stumbles over
            return None
    return shapes


def whole(load: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
    """A tensor that is had as one part."""
    return lambda: iter((load(),))


def in_parts(read: Callable[[int, int], Any], size: int) -> Iterator[Any]:
    """Flat values [0, size) in pieces of PART."""
    return (read(start, min(start + PART, size)) for start in range(0, size, PART))


def write_weights(
    weights: Mapping[str, Weight], out: Folder, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> dict[str, FileDigest]:
    """One safetensors file, or several with an index where there is more than `shard_bytes`. Files by name."""
    groups = _shards([weight.spec for weight in weights.values()], shard_bytes)
    files: dict[str, FileDigest] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with out.open_output(name) as stream:
            files[name] = write_parts(stream, group, lambda name: weights[name].parts(), metadata)
    if len(groups) > 1:
        places = {spec.name: name for name, group in zip(files, groups, strict=True) for spec in group}
        total = sum(weight.spec.num_bytes for weight in weights.values())
        out.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return files


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    return groups
