"""Distillation: a task's loss with a teacher beside the labels (Hinton et al. 2015, arXiv:1503.02531).

loss = alpha x T^2 x KL(teacher || student), both softened by T, + (1 - alpha) x the task's own loss; both are summed
over targets, so the gradient depends on the cut of a step as little as without a teacher. The teacher's logits are
computed beside the student's, in the same micro-batch; every rank holds the teacher whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.architecture import DOCUMENTS
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.memory import ModelSize
from trainers.model.world import World
from trainers.tasks import Task
from trainers.tasks.batch import move
from trainers.tasks.labels import has_head, head_labels
from trainers.tasks.losses import find_targets
from trainers.tasks.losses.router import with_router_loss

if TYPE_CHECKING:
    import torch


class Distilled:
    """A task's training loss with a teacher."""

    def __init__(
        self, task: Task, teacher: Any, temperature: float, alpha: float, places: Sequence[int] | None = None
    ) -> None:
        """With `places`, for each of the task's labels its output of the teacher, where their order differs."""
        self._task, self._teacher, self._temperature, self._alpha = task, teacher, temperature, alpha
        self._places = places

    def step_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training loss of a micro-batch, summed over targets. Raises JobError where the two do not fit."""

        def loss_of(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
            loss: torch.Tensor | None = self._loss_in_chunks(forward, model, inputs, labels, targets)
            return self._loss_of(forward(), inputs, labels, targets) if loss is None else loss

        return with_router_loss(self._task, loss_of, model, inputs, labels)

    def _loss_of(
        self,
        logits: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        import torch

        with torch.no_grad():
            wanted = self._task.forward(self._teacher, inputs)
        if wanted.shape != logits.shape:
            raise JobError(
                f"train.distill.teacher: it has {wanted.shape[-1]} outputs, the model {logits.shape[-1]}; "
                "teacher and student must share vocabulary and labels"
            )
        if self._places is not None:
            wanted = wanted.index_select(-1, move(np.array(self._places), wanted.device))
        targets = find_targets(labels) if targets is None else targets
        own = self._task.loss_sum(logits, labels, targets)
        said, guide = (every.flatten(0, -2).index_select(0, targets).float() for every in (logits, wanted))
        distance = divergence_sum(said, guide, self._temperature)
        return self._alpha * distance + (1 - self._alpha) * own

    def _loss_in_chunks(
        self,
        forward: Callable[[], torch.Tensor],
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> Any:
        """The same where both models end in a large vocabulary; None where they do not, or their sizes differ."""
        from trainers.tasks.losses.chunked import head_loss, head_of

        head, other = head_of(model), head_of(self._teacher)
        if not self._task.over_vocabulary or head is None or other is None or head.out_features != other.out_features:
            return None
        teacher = (lambda: self._task.forward(self._teacher, inputs), other, self._temperature, self._alpha)
        return head_loss(forward, head, labels, self._task.options.label_smoothing, targets, teacher)


def divergence_sum(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 x KL(teacher || student) summed over targets; both [targets, classes]."""
    from torch.nn.functional import kl_div, log_softmax

    said, wanted = log_softmax(logits / temperature, -1), log_softmax(teacher / temperature, -1)
    return temperature**2 * kl_div(said, wanted, reduction="sum", log_target=True)


def load_objective(job: Job, task: Task, pad_id: int, world: World) -> Task | Distilled:
    """The task itself, or with its teacher, who is loaded whole: call it before the engine partitions what it loads.

    Raises:
        JobError: where there is no such teacher.
    """
    from trainers.model.engine import load_options
    from trainers.model.source import find_teacher

    wish = job.train.distill
    teacher_path = find_teacher(job)
    if wish is None or teacher_path is None:
        return task
    if job.data.multi_label:
        raise JobError("train.distill: a teacher's distribution is over one label; data.multi_label must be off")
    options = load_options(job)
    if options.get("attn_implementation") == DOCUMENTS:  # asked of the student's architecture alone
        del options["attn_implementation"]
    try:
        teacher: Any = task.load_model(teacher_path, pad_id=pad_id, **options)
    except (OSError, ValueError) as error:
        raise JobError(f"train.distill.teacher: {wish.teacher} cannot be loaded: {error}") from error
    places = teacher_places(task, teacher_path, wish.teacher)
    teacher.to(world.device).eval().requires_grad_(False)
    return Distilled(task, teacher, wish.temperature, wish.alpha, places)


def with_teacher(size: ModelSize, job: Job) -> ModelSize:
    """The sizes of a job's model with those of its teacher, where it has one.

    Raises:
        JobError: where there is no such teacher.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainers.architecture import describe
    from trainers.model.model_size import build, give_storage, keep_bytes, stand_in_task
    from trainers.model.source import find_teacher

    path = find_teacher(job)
    if path is None:
        return size
    plain = job.model_copy(update={"model": job.model.model_copy(update={"lora": None, "freeze": ()})})
    task = stand_in_task(job)
    teacher = build(plain, task, path)
    with FakeTensorMode():
        give_storage(teacher)
        kept, outside = keep_bytes(teacher, size.length, task.over_vocabulary)
    weights = sum(each.numel() * each.element_size() for each in teacher.parameters())
    one_layer = (kept - outside) // describe(teacher.config).layers  # without a gradient it keeps no other
    return replace(size, teacher_bytes=weights, teacher_passing_bytes=one_layer)


def teacher_places(task: Task, teacher_path: str, name: str) -> list[int] | None:
    """For each label its output of the teacher, by name; None where they are the same, or have no names.

    Raises:
        JobError: where the teacher's head knows other labels, or it has none.
    """
    if not task.has_labels:
        return None
    if not has_head(teacher_path, task):
        raise JobError(f"train.distill.teacher: {name} has no head for these labels, so it would answer at random")
    own = head_labels(teacher_path, task)
    if own is None or own == task.labels:
        return None
    if set(own) != set(task.labels):
        raise JobError(
            f"train.distill.teacher: the head of {name} knows the labels {list(own)[:20]}, the job "
            f"{list(task.labels)[:20]}; name them alike in id2label of its config.json, or take another teacher"
        )
    return [own.index(label) for label in task.labels]
