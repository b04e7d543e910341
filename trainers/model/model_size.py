"""Sizes of a job's model, from its configuration alone. Begin at `measure_size`.

Nothing is guessed: the job's own model (its head, its adapters, what it freezes) runs on fake tensors, which have
shapes and no values. What autograd keeps is summed by layer; what passes through a layer is seen in a forward and a
backward pass of two layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.architecture import DOCUMENTS, attention_values, cut_layers, describe, feed_forward_layers
from trainers.architecture.sequence_parallel import sharing_heads
from trainers.job.schema import Job
from trainers.model.deepspeed_config import own_settings
from trainers.model.engine import prepare_model
from trainers.model.memory import ModelSize
from trainers.model.tiles import TILE, tile_feed_forward
from trainers.model.zero_settings import sizes_of
from trainers.tasks import Task, load_task, task_options
from trainers.tasks.losses.chunked import head_of

DEPTH = 2
"""Layers of the model whose backward pass is run: the last one's meets all that forward kept."""


def measure_size(job: Job, model_path: str) -> ModelSize:
    """Sizes of a job's model; sequences are of `data.max_length`, or of one rank's part of that."""
    import transformers

    transformers.logging.set_verbosity_error()
    task = stand_in_task(job)
    dtype, sharing = getattr(torch, job.model.dtype), job.train.sequence_parallel
    length = -(-job.data.max_length // sharing)
    model, cut, in_tiles = (build(job, task, model_path, depth) for depth in (None, DEPTH, DEPTH))
    with FakeTensorMode():
        for each in (model, cut):
            give_storage(each)
        shape = describe(model.config)
        vocabulary = shape.vocabulary if task.over_vocabulary else 0
        chunked = head_of(_core(model)) is not None and task.over_vocabulary
        parameters = list(model.parameters())
        tensors, largest = sizes_of(model)
        kept, outside = keep_bytes(model, length, task.over_vocabulary)
        passing = _passing_bytes(cut, length, task.over_vocabulary)
        tiled = _tiled_bytes(in_tiles, length, shape.width, task.over_vocabulary)
    query, key = (each * length * dtype.itemsize for each in attention_values(model.config))
    again = query if _one_by_one(job) else 0
    return ModelSize(
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        weight_bytes=dtype.itemsize,
        sequence_bytes=kept + shape.layers * again,
        outside_bytes=outside,
        passing_bytes=passing,
        tiled_layer_bytes=tiled[0] and tiled[0] + again,
        tiled_passing_bytes=tiled[1],
        tile_bytes=tiled[2],
        length=length,
        width=shape.width,
        vocabulary=vocabulary,
        targets=task.options.mask.fraction if job.task == "mlm" else 1.0,
        chunked=chunked,
        layers=shape.layers,
        sharing=sharing,
        heads=sharing_heads(model.config, model),
        query_bytes=query,
        key_bytes=key,
        tensors=tuple(tensors),
        largest_layer=largest,
        late_parameters=_late_parameters(model),
        checkpoints=_core(model).supports_gradient_checkpointing,
        saves_frozen=job.model.lora is None,
        own=own_settings(job.train.deepspeed),
    )


def stand_in_task(job: Job) -> Task:
    """The job's task before anything of its data is known."""
    task = load_task(job.task, task_options(job))
    task.labels = ("0", "1") if task.has_labels else ()
    return task


def _one_by_one(job: Job) -> bool:
    """Whether packed documents attend one after the other, so that each one's output is kept beside all of them."""
    on_cpu, wide = job.scale.gpus_per_worker == 0, job.model.dtype == "float32"
    return job.packing and job.model.attention == DOCUMENTS and (on_cpu or wide)


def _late_parameters(model: Any) -> int:
    from transformers.modeling_layers import GradientCheckpointingLayer

    first = next((part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)), None)
    late = [part for part in (first, _core(model).get_input_embeddings()) if part is not None]
    return sum(each.numel() for part in late for each in part.parameters() if each.requires_grad)


def build(job: Job, task: Task, model_path: str, layers: int | None = None) -> Any:
    """The job's model as it trains, on the meta device; no layer is computed again."""
    import transformers
    from transformers.initialization import no_init_weights

    trust, dtype = job.model.trust_remote_code, getattr(torch, job.model.dtype)
    config = task.load_config(model_path, 0, trust)
    if layers is not None:
        cut_layers(config, layers)
    auto: Any = getattr(transformers, task.head_class(config))
    if type(config) not in auto._model_mapping and not trust:
        auto = transformers.AutoModel
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()
    train = job.train.model_copy(update={"activation_checkpointing": "none", "feed_forward_tiles": False})
    return prepare_model(model, job.model_copy(update={"train": train}), task)


def give_storage(model: Any) -> None:
    """From the meta device, where adapters can be put on, to fake tensors on a CPU, which run its operators."""
    made: dict[int, tuple[Any, Any]] = {}
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    like = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, torch.nn.Parameter)
                    new = torch.nn.Parameter(like, requires_grad=tensor.requires_grad) if trained else like
                    made[id(tensor)] = tensor, new
                held[name] = made[id(tensor)][1]


def keep_bytes(model: Any, length: int, over_vocabulary: bool) -> tuple[int, int]:
    """What the forward pass of one sequence keeps for the backward pass, logits over the vocabulary apart; and what of
    it is kept outside the layers.

    Where the forward pass does not run on fake tensors, the rule of Korthikanti et al. (2022) stands in.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}
    inside: set[int] = set()
    depth = 0

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        if depth:
            inside.add(storage._cdata)
        return tensor

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    hooks = [hook for part in layers for hook in (part.register_forward_pre_hook(enter),
                                                  part.register_forward_hook(leave))]  # fmt: skip
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor), _without_logits(model, over_vocabulary):
            model(**_inputs(model, length))
    except Exception:  # an architecture whose forward pass asks for values, or for more than text
        shape = describe(model.config)
        rule = 17 * next(model.parameters()).dtype.itemsize * length * shape.width * shape.layers
        return rule, 0  # arXiv:2205.05198
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {key: storage.nbytes() for key, storage in kept.items() if key not in held}
    return sum(sizes.values()), sum(size for key, size in sizes.items() if key not in inside)


def _passing_bytes(model: Any, length: int, over_vocabulary: bool) -> int:
    """What a sequence's forward and backward passes hold at the most, over what forward keeps. Gradients of weights do
    not grow with sequences: the second sequence's share shows the rest."""
    try:
        one, two = (_passing(model, length, sequences, over_vocabulary) for sequences in (1, 2))
    except Exception:  # as in `keep_bytes`
        return 0
    return max(two - one, 0)


def _tiled_bytes(model: Any, length: int, width: int, over_vocabulary: bool) -> tuple[int, int, int]:
    """Of a model with so many layers as DEPTH, once its feed-forward layers are in tiles: what a layer keeps of one
    sequence, what passes through it, and what a tile takes. Zeros where there are none, or a sequence is one tile."""
    layers, (some, more) = feed_forward_layers(_core(model)), (2 * TILE, 4 * TILE)
    if not layers or length <= TILE:
        return 0, 0, 0
    try:
        give_storage(model)
        tile = max(_tile_bytes(layer, width) for layer in layers)
        tile_feed_forward(_core(model))
        kept, outside = keep_bytes(model, some, over_vocabulary)
        passing = [_passing(model, each, 1, over_vocabulary) for each in (some, more)]
    except Exception:  # as in `keep_bytes`
        return 0, 0, 0
    return (
        (kept - outside) // DEPTH * length // some,
        max(passing[1] - passing[0], 0) * length // (more - some),
        tile,
    )


def _tile_bytes(layer: Any, width: int) -> int:
    """What a layer's tile takes in the backward pass, with the sums of gradients in fp32."""
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    states = torch.empty(1, TILE, width, dtype=next(layer.parameters()).dtype, requires_grad=True)
    with Live() as live:
        layer(states).sum().backward()
    for weight in layer.parameters():
        weight.grad = None
    return int(live.peak + sum(4 * weight.numel() for weight in weights))


def _passing(model: Any, length: int, sequences: int, over_vocabulary: bool) -> int:
    def let_go(parameter: Any) -> None:
        parameter.grad = None

    hooks = [each.register_post_accumulate_grad_hook(let_go) for each in model.parameters() if each.requires_grad]
    inputs = _inputs(model, length, sequences)
    with _without_logits(model, over_vocabulary), Live() as live:
        output = model(**inputs)
        output = output.logits if hasattr(output, "logits") else output[0]
        loss = output.float().sum()
        del output
        kept = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return int(live.peak - kept)


class Live(TorchDispatchMode):  # type: ignore[misc]  # torch is not typed here
    """Bytes of all tensors that operators made within and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if torch.is_tensor(tensor):
                self._note(tensor.untyped_storage(), given)
        return found

    def _note(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _core(model: Any) -> Any:
    """Without peft's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _without_logits(model: Any, over_vocabulary: bool) -> Iterator[None]:
    """The output layer hands on what it was given: logits over the vocabulary are counted apart."""
    head = _core(model).get_output_embeddings() if over_vocabulary else None
    if head is None:
        yield
        return
    head.forward = lambda hidden: hidden[..., :1]
    try:
        yield
    finally:
        del head.forward


def _inputs(model: Any, length: int, sequences: int = 1) -> dict[str, Any]:
    ids = torch.zeros(sequences, length, dtype=torch.long)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **extra}
