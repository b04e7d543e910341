"""The cheapest way to train: every rank holds the whole state, and no ZeRO hook runs. For models that fit.

It answers to what the loop asks of DeepSpeed's engine. Working weights in bf16 have fp32 masters beside them, and
gradients are summed in fp32 over micro-batches and ranks, so steps equal those of a ZeRO stage but for rounding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BUCKET_BYTES = 256 * 2**20
"""Gradients of one all-reduce: few enough calls, and little memory for the flat copy."""


class PlainEngine(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A model, its fp32 masters and its optimizer."""

    def __init__(self, model: Any, groups: list[dict[str, Any]], settings: dict[str, Any], config: dict[str, Any]):
        """Args: groups of the model's parameters; settings of AdamW; config as `derive_config` makes it."""
        super().__init__()
        self.module = model
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._clip = config["gradient_clipping"]
        self._last = True
        self._norm: Any = None
        self.masters = {
            parameter: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for group in groups
            for parameter in group["params"]
        }
        for group in groups:
            group["params"] = [self.masters[parameter] for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, **settings)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def zero_optimization_stage(self) -> int:
        """As DeepSpeed's engine says it: nothing is partitioned."""
        return 0

    def get_global_grad_norm(self) -> Any:
        """Of the last update, before clipping; a scalar on the device."""
        return self._norm

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batch to come is the last of its step."""
        self._last = is_boundary

    def backward(self, loss: Any, scale_wrt_gas: bool = False) -> None:
        """Add a micro-batch's gradients to the step's."""
        assert not scale_wrt_gas, "the loop scales its losses itself"
        loss.backward()
        for parameter, master in self.masters.items():
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def step(self) -> None:
        """Update after the last micro-batch of a step; before that, nothing."""
        if not self._last:
            return
        gradients = [self._gradient(master) for master in self.masters.values()]
        if self.world_size > 1:
            average(gradients, self.world_size)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip > 0:
            torch._foreach_mul_(gradients, torch.clamp(self._clip / (self._norm + 1e-6), max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if halves := [(parameter, master) for parameter, master in self.masters.items() if master is not parameter]:
                torch._foreach_copy_(*(list(side) for side in zip(*halves, strict=True)))

    def _gradient(self, master: Any) -> Any:
        """A parameter that no loss reached has a gradient of zero, as under ZeRO, so it decays like the others."""
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def destroy(self) -> None:
        """Let go of the state."""
        self.masters.clear()
        self.optimizer.state.clear()


def average(gradients: list[Any], world_size: int) -> None:
    """Replace the gradients by their mean over all ranks."""
    for bucket in _buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat.div_(world_size)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


def _buckets(gradients: list[Any]) -> Iterator[list[Any]]:
    bucket: list[Any] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
