"""Checkpoints of a training with adapters: merged into plain weights, a tensor at a time.

What stays frozen is in no checkpoint; it is read from the pretrained folder when it is its turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from trainers.architecture import Weight, in_parts, transposed_weights, whole
from trainers.checkpoint.reading import CheckpointReader
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.lora import is_adapted, merged_reader, merged_sources, unread_weights
from trainers.pretrained import load_to_disk, read_offloaded
from trainers.tasks import Task
from trainers.tensor_file import TensorSpec


def merged_weights(
    reader: CheckpointReader, job: Job, task: Task, config: Any, model_path: str, empty: Any, scratch: str
) -> dict[str, Weight]:
    """The weights of the merged model by name.

    Args:
        empty: the model on the meta device.
        scratch: a folder for weights of the pretrained model that have to be converted.

    Raises:
        EvaluationError: where frozen weights are neither in the checkpoint nor in the pretrained folder.
    """
    import torch

    assert job.model.lora is not None
    dtype, shapes = getattr(torch, job.model.dtype), reader.state.shapes
    sources = merged_sources(shapes)
    base = _frozen_weights(job, task, config, model_path, empty, scratch)
    frozen = {name for name, source in sources.items() if not reader.holds("weight", source)}
    _check_frozen(sorted(frozen), base, model_path)

    def read(source: str) -> Any:
        if reader.holds("weight", source):
            return reader.read("weight", source, 0, prod(shapes[source])).view(shapes[source])
        return base[plain[source]]().float()

    plain = {source: name for name, source in sources.items()}
    merged = merged_reader(shapes, read, job.model.lora, transposed_weights(empty))

    def merge(name: str) -> Any:
        return merged(name).to(dtype)

    weights: dict[str, Weight] = {}
    for name, source in sources.items():
        if is_adapted(source):
            load = partial(merge, name)
            weights[name] = Weight(TensorSpec(name, job.model.dtype, tuple(shapes[source])), load, whole(load))
        elif name in frozen:
            weights[name] = _frozen_weight(name, job.model.dtype, shapes[source], base[name])
        else:
            weights[name] = trained_weight(reader, source, name, dtype)
    return weights


def trained_weight(reader: CheckpointReader, source: str, name: str, dtype: Any) -> Weight:
    """A weight that the checkpoint holds, in the type that is published.

    Args:
        source: its name in the checkpoint.
    """
    shape = reader.state.shapes[source]

    def load() -> Any:
        return reader.read("weight", source, 0, prod(shape)).view(shape).to(dtype)

    def parts() -> Iterator[Any]:
        return in_parts(lambda start, end: reader.read("weight", source, start, end).to(dtype), prod(shape))

    return Weight(TensorSpec(name, str(dtype).removeprefix("torch."), tuple(shape)), load, parts)


def _frozen_weight(name: str, dtype: str, shape: Sequence[int], load: Callable[[], Any]) -> Weight:
    def parts() -> Iterator[Any]:
        flat = load().flatten()
        return in_parts(lambda start, end: flat[start:end], prod(shape))

    return Weight(TensorSpec(name, dtype, tuple(shape)), load, parts)


def _frozen_weights(
    job: Job, task: Task, config: Any, model_path: str, empty: Any, scratch: str
) -> dict[str, Callable[[], Any]]:
    """Weights of the pretrained model, which checkpoints with adapters do not hold, in its type; read when asked for.
    Without those that the folder lacks, which were drawn at random; of these, zeros for what the task does not read."""
    import torch
    import transformers

    auto: Any = getattr(transformers, task.head_class(config))
    model, missing = load_to_disk(
        auto,
        model_path,
        scratch,
        config=config,
        dtype=getattr(torch, job.model.dtype),
        use_safetensors=True,
        trust_remote_code=job.model.trust_remote_code,
    )
    unread = missing & unread_weights(empty, task) if missing else frozenset()
    found: dict[str, Callable[[], Any]] = {}
    for name, weight in model.named_parameters():
        if name in unread:
            found[name] = partial(torch.zeros, tuple(weight.shape), dtype=weight.dtype)
        elif name not in missing:
            found[name] = partial(read_offloaded, model, name)
    return found


def _check_frozen(needed: Sequence[str], base: Mapping[str, Any], model_path: str) -> None:
    """Raises EvaluationError where frozen weights are neither in the checkpoint nor in the pretrained folder."""
    lost = sorted(set(needed) - base.keys())
    if lost:
        raise EvaluationError(
            f"a checkpoint with adapters holds what is trained alone, and {len(lost)} frozen weights are not in "
            f"{model_path} either: {', '.join(lost[:5])}. They were drawn at random when the training began, and "
            "cannot be had again: take a model folder that has them, or train without model.lora"
        )
