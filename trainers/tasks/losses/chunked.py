"""Cross entropy over a large vocabulary, in chunks of positions, so that no tensor ever holds all logits.

A batch of 8,192 positions with a vocabulary of 152,064 has logits of 2.3 GiB in bf16; their fp32 copy and gradient take
another 9.3. Here the model's output layer computes the loss itself: for a chunk of positions at a time logits, loss and
gradients, the latter already in the forward pass (as Liger's kernels do: Hsu et al. 2024, arXiv:2410.10989), so that no
logits are computed twice. Begin at `head_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trainers.compiler import has_triton
from trainers.tasks.losses import CARD_CHUNK_BYTES, TokenScores, find_targets, join_scores, score_logits
from trainers.tasks.losses import CHUNK_BYTES as CHUNK_BYTES

LEAST_VOCABULARY = 8192
"""Below this the logits are no larger than other activations."""


@dataclass(frozen=True)
class Teacher:
    """A teacher's last hidden states for the same positions, and its output layer."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    alpha: float
    """Weight of the teacher's part; 1 - alpha is that of the labels."""


def chunk_rows(vocabulary: int, on_card: bool) -> int:
    """Positions whose fp32 logits fit into a chunk."""
    return max((CARD_CHUNK_BYTES if on_card else CHUNK_BYTES) // (4 * vocabulary), 16)


class ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    """Loss summed over targets; its gradients are computed beside it, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
        teacher: Teacher | None,
    ) -> torch.Tensor:
        """Args: hidden [targets, width], weight [vocabulary, width], labels int64 [targets]. Returns fp32 scalar."""
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=_wide(weight.dtype)) if bias is not None and wants_bias else None
        fused = teacher is None and _fused_takes(hidden)
        rows = chunk_rows(len(weight), fused)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            if fused:
                from trainers.tasks.losses.fused import loss_and_slope

                logits = torch.nn.functional.linear(hidden[part], weight, bias)
                loss, slope = loss_and_slope(logits, labels[part], smoothing)
            else:
                logits = _logits(hidden[part], weight, bias)
                guide = None if teacher is None else _logits(teacher.hidden[part], teacher.weight, teacher.bias)
                loss, slope = _loss_and_slope(logits, labels[part], smoothing, guide, teacher)
            total += loss
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(slope, weight, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, slope, hidden[part])
            logits = slope = guide = None  # else they lie beside the next chunk's
        ctx.gradients = tuple(
            None if found is None else found.to(like.dtype)
            for found, like in ((of_hidden, hidden), (of_weight, weight), (of_bias, weight))
        )
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The loss enters what is minimized by a factor, so its gradients are those of the forward pass times it."""
        scaled = (None if found is None else found.mul_(gradient) for found in ctx.gradients)
        result = (*scaled, None, None, None)
        ctx.gradients = ()
        return result


def _fused_takes(hidden: torch.Tensor) -> bool:
    """Whether one kernel computes a chunk: on a GPU, where Triton is at hand."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and has_triton()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return dtype if dtype == torch.float64 else torch.float32


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).to(_wide(hidden.dtype))


def _add_product(total: torch.Tensor, slope: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += slope^T hidden, in the dtype of `total`."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden


def _loss_and_slope(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, guide: torch.Tensor | None, teacher: Teacher | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a chunk and its gradient by the logits, which takes the logits' own memory."""
    distance = slope = None
    if guide is not None and teacher is not None:
        distance, slope = _distance_and_slope(logits, guide, teacher.temperature)
    most = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, labels[:, None])
    mean = logits.mean(-1, keepdim=True) if smoothing else None
    own_slope = logits.sub_(most).exp_()  # one exponential gives loss and slope
    total = own_slope.sum(-1, keepdim=True)
    log_sum = most + total.log()
    own = (log_sum - picked).sum()
    if mean is not None:
        own = (1 - smoothing) * own + smoothing * (log_sum - mean).sum()
    own_slope.div_(total)
    if smoothing:
        own_slope -= smoothing / logits.shape[-1]
    own_slope.scatter_add_(1, labels[:, None], own_slope.new_full((len(labels), 1), smoothing - 1.0))
    if distance is None or slope is None or teacher is None:
        return own, own_slope
    loss = teacher.alpha * distance + (1 - teacher.alpha) * own
    return loss, slope.mul_(teacher.alpha).add_(own_slope, alpha=1 - teacher.alpha)


def _distance_and_slope(
    logits: torch.Tensor, guide: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """T^2 KL(teacher || student) summed, and its gradient by the student's logits: T (student - teacher)."""
    student = (logits / temperature).log_softmax(-1)
    wanted = (guide / temperature).log_softmax(-1)
    distance = temperature**2 * (wanted.exp() * (wanted - student)).sum()
    return distance, student.exp_().sub_(wanted.exp_()).mul_(temperature)


def head_of(model: Any) -> torch.nn.Linear | None:
    """The layer that gives a model's logits over a large vocabulary, where it is a plain linear one."""
    core = getattr(model, "module", model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    if head is None or type(head) is not torch.nn.Linear or head.out_features < LEAST_VOCABULARY:
        return None
    return head


def head_loss(
    forward: Callable[[], torch.Tensor],
    head: torch.nn.Linear,
    labels: torch.Tensor,
    smoothing: float,
    targets: torch.Tensor | None = None,
    teacher: tuple[Callable[[], torch.Tensor], torch.nn.Linear, float, float] | None = None,
) -> torch.Tensor | None:
    """The loss of a forward pass, computed by the output layer in place of its logits.

    Args:
        forward: runs the model and gives its logits [batch, seq, vocabulary].
        labels: int64 [batch, seq], IGNORE where there is no target.
        targets: as `Batch.targets` gives them; None looks for them.
        teacher: the same of a teacher, with temperature and alpha.

    Returns:
        fp32 scalar; None where the model does more with its logits than the output layer (a soft cap, a scale), so that
        the loss must be computed from them.
    """
    targets = find_targets(labels) if targets is None else targets
    wanted = labels.flatten().index_select(0, targets)
    guide = None if teacher is None else _watch_teacher(*teacher, targets)
    inside: list[torch.Tensor] = []

    def loss_in_place(hidden: torch.Tensor) -> torch.Tensor:
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets)
        loss: torch.Tensor = ChunkedLoss.apply(picked, head.weight, head.bias, wanted, smoothing, guide)
        inside.append(loss.detach())
        return loss.reshape(1, 1, 1)

    with _replaced(head, loss_in_place):
        given = forward()
    if given.numel() != 1 or len(inside) != 1:
        return None
    return given.reshape(()) if _untouched(head, given, inside[0]) else None


def loss_in_place(
    model: Any,
    forward: Callable[[], torch.Tensor],
    labels: torch.Tensor,
    smoothing: float,
    targets: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`head_loss` by a model's own output layer; None also where that is not a plain one over a large vocabulary."""
    head = head_of(model)
    return None if head is None else head_loss(forward, head, labels, smoothing, targets)


def scores_in_place(model: Any, forward: Callable[[], torch.Tensor], labels: torch.Tensor) -> TokenScores | None:
    """For evaluation, what `head_loss` is for training: each target's loss, and whether it was the likeliest token.

    Returns:
        None where `head_loss` gives None, or the model has no plain output layer over a large vocabulary.
    """
    head = head_of(model)
    if head is None:
        return None
    targets = find_targets(labels)
    wanted = labels.flatten().index_select(0, targets)
    inside: list[TokenScores] = []

    def score(hidden: torch.Tensor) -> torch.Tensor:  # on another device than the labels where a map spreads the model
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.to(hidden.device))
        rows, those = chunk_rows(head.out_features, False), wanted.to(hidden.device)
        parts = [
            score_logits(_logits(picked[start : start + rows], head.weight, head.bias), those[start : start + rows])
            for start in range(0, max(len(picked), 1), rows)
        ]
        inside.append(join_scores(parts))
        return inside[-1].losses.sum().reshape(1, 1, 1)

    with _replaced(head, score):
        given = forward()
    if given.numel() != 1 or len(inside) != 1:
        return None
    return inside[0] if _untouched(head, given, inside[0].losses.sum().to(given.device)) else None


def _untouched(head: Any, given: torch.Tensor, inside: torch.Tensor) -> bool:
    """Whether what comes out of the model is what its output layer gave; asked of a model once, for it waits."""
    known: bool | None = getattr(head, "gives_logits", None)
    if known is None:
        known = bool(given.detach().reshape(()) == inside)
        head.gives_logits = known
    return known


def _watch_teacher(
    forward: Callable[[], torch.Tensor], head: torch.nn.Linear, temperature: float, alpha: float, targets: torch.Tensor
) -> Teacher:
    """Run a teacher without a gradient, up to its output layer."""
    with torch.no_grad():
        hidden = hidden_states(head, forward).flatten(0, -2).index_select(0, targets)
    return Teacher(hidden, head.weight, head.bias, temperature, alpha)


def hidden_states(head: torch.nn.Linear, forward: Callable[[], Any]) -> torch.Tensor:
    """What a forward pass gives its output layer, [batch, seq, width]; no logits are made."""
    found: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    with _replaced(head, keep):
        forward()
    return found[0]


@contextmanager
def _replaced(head: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Another forward pass of one layer, for a while; hooks around it stay: ZeRO's gathering, and what a device map
    puts around the pass of each layer, which is kept under another name then."""
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    own = vars(head).get(name)
    setattr(head, name, forward)
    try:
        yield
    finally:
        delattr(head, name) if own is None else setattr(head, name, own)
