"""The loss that balances a mixture's experts, beside any loss of a task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainers.architecture import experts, plain_model, router_loss_weight
from trainers.tasks.batch import IGNORE

if TYPE_CHECKING:
    import torch


def with_router_loss(
    task: Any,
    loss_of: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
) -> torch.Tensor:
    """A loss of what a forward pass gives, and the balancing loss where the model's configuration says so
    (`output_router_logits`): a mean over a micro-batch, it alone depends on how a step is cut up.

    Args:
        loss_of: the loss summed over targets; it is given what runs the model and gives its logits.
    """
    passed: list[Any] = []

    def forward() -> torch.Tensor:
        passed.append(task.outputs(model, inputs))
        logits: torch.Tensor = task.read(passed[-1], inputs)
        return logits

    loss = loss_of(forward)
    if not router_loss_weight(plain_model(model).config) or getattr(passed[-1], "router_logits", None) is None:
        return loss
    balance: torch.Tensor = _router_loss(model, passed[-1], task.real_tokens(inputs)) * (labels != IGNORE).sum()
    return loss + balance


def _router_loss(model: Any, outputs: Any, real: Any) -> Any:
    """The balancing loss of a forward pass, times its weight, as the model's own module computes it.

    Args:
        real: [batch, seq], 0 where there is padding, which no expert is charged for.
    """
    inner = plain_model(model)
    balance = sys.modules[type(inner).__module__].load_balancing_loss_func
    return router_loss_weight(inner.config) * balance(outputs.router_logits, *experts(inner.config), real)
