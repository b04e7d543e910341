"""A rank's share of the state: which span of which parameter it owns, and how to take it out and put it back.

Spans are offsets into the flattened parameter, so files do not depend on the world size that wrote them. ZeRO-3 owns
an equal part of every parameter; ZeRO-1 and -2 own a stretch of all parameters laid end to end. Knows DeepSpeed's
flat groups of parameters and nothing of files.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from trainers.checkpoint.swapped import SwapSpan, in_memory, state_span
from trainers.tensor_file import TensorSpec, spec_of

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 weight, and AdamW's first and second moment."""
Read = Callable[[str, str, int, int], Any]
"""read(kind, parameter, start, end) gives the fp32 values of a span."""


@dataclass(frozen=True)
class Span:
    """The part [start, end) of one flattened parameter."""

    name: str
    start: int
    end: int
    trainable: bool


@dataclass(frozen=True)
class Piece:
    """One tensor that a rank writes down."""

    spec: TensorSpec
    """Its name in the file is `kind/parameter`."""
    live: Callable[[], Any]
    """Gives the tensor as it is now, on its device and in its type, or the span of a swap file where it lies; AdamW's
    moments exist after the first update."""
    is_fixed: bool = True
    """Whether only an update changes it; a module's buffers may change in a forward pass."""

    def parts(self, num_values: int) -> Iterator[Any]:
        """The tensor as it is now, in consecutive parts of its values: views where it lies in memory."""
        import torch

        held, total = self.live(), prod(self.spec.shape)
        flat = held if isinstance(held, SwapSpan) else held.detach().flatten()
        for start in range(0, total, num_values):
            end = min(start + num_values, total)
            part = flat.read(start, end) if isinstance(flat, SwapSpan) else flat[start:end]
            yield part.to(getattr(torch, self.spec.dtype))


@dataclass(frozen=True)
class RankShare:
    """Everything a rank writes down, the same from the first save to the last."""

    pieces: tuple[Piece, ...]
    starts: dict[str, int]
    """Offset of this rank's part in each flattened parameter."""


def stage_of(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def is_offloaded(engine: Any) -> bool:
    """Whether the optimizer's state is kept beyond the device, in host memory or on disk."""
    optimizer = engine.optimizer
    return bool(getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False))


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Full shape of every parameter, by name; tied ones once."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def rank_share(engine: Any) -> RankShare:
    """This rank's fp32 weights, moments and (on rank 0) buffers."""
    parameters = dict(engine.module.named_parameters())
    pieces: list[Piece] = []
    starts: dict[str, int] = {}
    for span in owned_spans(engine):
        for kind in KINDS if span.trainable else KINDS[:1]:
            spec = TensorSpec(f"{kind}/{span.name}", "float32", (span.end - span.start,))
            pieces.append(Piece(spec, partial(_local, engine, parameters[span.name], kind, span)))
        starts[span.name] = span.start
    if engine.global_rank == 0:
        for name, buffer in persistent_buffers(engine.module):
            pieces.append(Piece(spec_of(f"buffer/{name}", buffer), buffer.detach, is_fixed=False))
    return RankShare(tuple(pieces), starts)


def saves_frozen(engine: Any) -> bool:
    """Whether checkpoints hold frozen weights. Under adapters those are the pretrained model's, which is there."""
    return not hasattr(engine.module, "peft_config")


def owned_spans(engine: Any) -> Iterator[Span]:
    """The spans this rank owns and must save; empty ones left out."""
    for name, parameter in engine.module.named_parameters():
        trainable = bool(parameter.requires_grad)
        if not trainable and not saves_frozen(engine):
            continue
        if stage_of(engine) == 0:  # every rank has all of it and writes an equal part
            part = -(-parameter.numel() // engine.world_size)
            start, end = part * engine.global_rank, min(part * (engine.global_rank + 1), parameter.numel())
        elif hasattr(parameter, "ds_id"):
            part = parameter.ds_tensor.ds_numel
            start, end = part * engine.global_rank, min(part * (engine.global_rank + 1), parameter.ds_numel)
        elif not trainable:
            start, end = 0, parameter.numel() if engine.global_rank == 0 else 0
        elif parameter._hp_mapping is None:
            continue
        else:
            address = parameter._hp_mapping.lp_fragment_address
            start, end = address.start, address.start + address.numel
        if start < end:
            yield Span(name, start, end, trainable)


def persistent_buffers(module: Any) -> list[tuple[str, Any]]:
    return [
        (f"{path}.{name}".lstrip("."), buffer)
        for path, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]


def _local(engine: Any, parameter: Any, kind: str, span: Span) -> Any:
    """This rank's values of one kind, flat and without padding, or where they lie on disk."""
    length = span.end - span.start
    if stage_of(engine) == 0:
        return _replicated(engine, parameter, kind).flatten().narrow(0, span.start, length)
    if hasattr(parameter, "ds_id"):
        if not span.trainable:
            return parameter.ds_tensor.data.narrow(0, 0, length)
        if swapped := state_span(engine.optimizer, parameter, kind):
            return swapped
        return _partition(engine.optimizer, parameter, kind).narrow(0, 0, length)
    if not span.trainable:
        return parameter.data.flatten()
    return _fragment(engine, parameter._hp_mapping, kind)


def _partition(optimizer: Any, parameter: Any, kind: str) -> Any:
    """ZeRO-3: this rank's part of a parameter where it lies, padded at the end. DeepSpeed's own accessor brings it to
    the device, which has no room for what was offloaded."""
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    values = flat.data if kind == "weight" else optimizer.optimizer.state[flat][kind]
    return values.narrow(0, offset, length)


def full_weight(engine: Any, parameter: Any) -> Any:
    """A trainable parameter in fp32, whole; a collective, which every rank must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    if stage_of(engine) == 0:
        return _replicated(engine, parameter, "weight")
    return safe_get_full_fp32_param(parameter)


def _replicated(engine: Any, parameter: Any, kind: str) -> Any:
    """PlainEngine: a parameter's master, or a moment of it."""
    master = engine.masters.get(parameter, parameter)
    return master.detach() if kind == "weight" else engine.optimizer.state[master][kind]


def _fragment(engine: Any, mapping: Any, kind: str) -> Any:
    """ZeRO-1 and -2: this rank's fragment of a parameter, inside the flat partition of its group.

    DeepSpeed 0.19 links moments to parameters after the first group's first step, when the other groups have none yet,
    so its own accessor knows those of one group only.
    """
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    values = flat.data if kind == "weight" else engine.optimizer.optimizer.state[flat][kind]
    return values.narrow(0, address.start, address.numel)


def restore_state(engine: Any, read: Read, optimizer_steps: int) -> None:
    """Set weights, moments and step count of this rank from spans of a checkpoint, whatever world size wrote it."""
    restore = {0: _restore_replicated, 3: _restore_partitioned}.get(stage_of(engine), _restore_fragments)
    restore(engine, read, optimizer_steps)


def _restored(engine: Any) -> Iterator[tuple[str, Any]]:
    """The parameters that a checkpoint holds."""
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad or saves_frozen(engine))


def _create_moments(adamw: Any, tensors: Iterable[Any], optimizer_steps: int) -> None:
    """AdamW makes its state at the first update; before it can be set it must be there."""
    import torch

    for tensor in tensors:
        state = adamw.state[tensor]
        state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=tensor.device)
        for kind in KINDS[1:]:
            state.setdefault(kind, torch.zeros_like(tensor.data))


def _restore_partitioned(engine: Any, read: Read, optimizer_steps: int) -> None:
    """ZeRO-3: the fp32 partition, its moments, and the working partition that forward gathers; a group at a time, for
    each may lie on disk."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def own(kind: str, name: str, parameter: Any) -> Any:
        part, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel
        start = part * engine.global_rank
        return _padded(read(kind, name, min(start, whole), min(start + part, whole)), part)

    names = {}
    for name, parameter in _restored(engine):
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small parameters stay gathered between steps
            parameter.partition()
        names[parameter] = name
        if not parameter.requires_grad:
            parameter.ds_tensor.data.copy_(own("weight", name, parameter))
    optimizer = engine.optimizer
    for number, group in enumerate(optimizer.fp16_groups):
        with in_memory(optimizer, number) as flat:
            _create_moments(optimizer.optimizer, [flat], optimizer_steps)
            for parameter in group:
                for kind in KINDS:
                    _partition(optimizer, parameter, kind).copy_(own(kind, names[parameter], parameter))


def _padded(values: Any, length: int) -> Any:
    from torch.nn.functional import pad

    return values if len(values) == length else pad(values, (0, length - len(values)))


def _restore_replicated(engine: Any, read: Read, optimizer_steps: int) -> None:
    """PlainEngine: every rank holds everything."""
    _create_moments(engine.optimizer, engine.masters.values(), optimizer_steps)
    for name, parameter in _restored(engine):
        parameter.data.copy_(read("weight", name, 0, parameter.numel()).view(parameter.shape))
        for kind in KINDS if parameter.requires_grad else ():
            values = read(kind, name, 0, parameter.numel()).view(parameter.shape)
            _replicated(engine, parameter, kind).copy_(values)


def _restore_fragments(engine: Any, read: Read, optimizer_steps: int) -> None:
    """ZeRO-1 and -2: the fragments this rank owns, and the whole working weights, which every rank holds."""
    optimizer = engine.optimizer
    _create_moments(optimizer.optimizer, optimizer.single_partition_of_fp32_groups, optimizer_steps)
    for name, parameter in _restored(engine):
        parameter.data.copy_(read("weight", name, 0, parameter.numel()).view(parameter.shape))
        mapping = parameter._hp_mapping if parameter.requires_grad else None
        if mapping is None:
            continue
        address = mapping.lp_fragment_address
        for kind in KINDS:
            _fragment(engine, mapping, kind).copy_(read(kind, name, address.start, address.start + address.numel))
