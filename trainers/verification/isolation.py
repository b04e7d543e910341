"""Whether documents that share a sequence or a batch can see each other: asked of the model itself.

One document is changed, and no logit of another may move. What masks them depends on the architecture, the attention
backend and the library's version, so no list of safe combinations is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trainers.architecture.sequence_parallel import SequenceGroup
from trainers.batching.packing import PackIndex
from trainers.errors import TrainingError
from trainers.model.zero_passes import beside_training
from trainers.records import Array
from trainers.shards.dataset import ShardSet
from trainers.tasks import Example, Task
from trainers.tasks.base import IGNORE, Batch
from trainers.tasks.losses.chunked import head_of, hidden_states
from trainers.verification.longest import longest_packs

DOCUMENTS = 3
ALIKE = {"float32": 1e-4, "bfloat16": 0.05}
"""Share of the largest value that another order of sums may move, by the model's type."""
TOLERANCE = 1e-5
"""Share of the largest logit that rounding may move; a leak moves logits by tenths (0.39 in a packed Llama)."""


def check_isolation(
    model: Any,
    task: Task,
    shards: ShardSet,
    packs: PackIndex,
    micro_batch_size: int,
    pad_id: int,
    backend: str,
    device: Any,
    group: SequenceGroup | None = None,
) -> None:
    """Change one packed document and look at what the model says of the others, in micro-batches as the training has
    them: the longest packs, the first of them with short documents in its place. Every rank calls this with the same
    shards.

    Args:
        model: the engine, or any model; its mode is restored afterwards.
        backend: the job's attention backend, for the message.
        group: the ranks that share each sequence.

    Raises:
        TrainingError: where a document sees another.
    """
    rows, longest = short_rows(shards, shards.lengths), longest_packs(shards, packs, micro_batch_size)
    batches = [[rows, *longest[1:]]]
    if len(longest[0]) > 1:  # a leak may need the length
        batches.append(longest)
    changed, moved = max(
        (worst_leak(model, task, batch, pad_id, device, group) for batch in batches),
        key=lambda pair: pair[1],
    )
    if moved > TOLERANCE:
        raise TrainingError(
            f"packed documents see each other: changing document {changed + 1} of a pack moved logits of "
            f"the others by {moved:.3g} of the largest. The attention backend (model.attention: {backend}) "
            "does not keep them apart in this model: choose another, such as sdpa, or set data.packing: false"
        )


def worst_leak(
    model: Any,
    task: Task,
    packs: Sequence[Sequence[Example]],
    pad_id: int,
    device: Any,
    group: SequenceGroup | None = None,
) -> tuple[int, float]:
    """The document of the first pack whose change moves the others most, and by how much: of the first, which those
    after it must not see, and of the last."""

    def states(batch: Batch) -> torch.Tensor:
        return shared_states_of(model, task, batch, device, group) if group else states_of(model, task, batch, device)

    moves = []
    with evaluating(model):
        before = _by_document(task.collate(packs, pad_id), states)
        for changed in sorted({0, len(packs[0]) - 1}):
            moved, _ = logit_change(states, task, packs, changed, pad_id, before=before)
            moves.append((changed, moved))
    return max(moves, key=lambda pair: pair[1])


def logits_of(model: Any, task: Task, batch: Batch, device: Any) -> torch.Tensor:
    """What the loss is computed from, fp32 on the host."""
    inputs, _ = batch.to(device)
    with torch.no_grad():
        return task.forward(model, inputs).float().cpu()


def states_of(model: Any, task: Task, batch: Batch, device: Any) -> torch.Tensor:
    """What logits over a large vocabulary are made of, which no training ever holds whole; smaller logits themselves.
    fp32 on the host."""
    head = head_of(model) if task.over_vocabulary else None
    if head is None:
        return logits_of(model, task, batch, device)
    inputs, _ = batch.to(device)
    with torch.no_grad():
        hidden = hidden_states(head, lambda: task.forward(model, inputs))
    return hidden.reshape(*batch.labels.shape, -1).float().cpu()


def shared_states_of(model: Any, task: Task, batch: Batch, device: Any, group: SequenceGroup) -> torch.Tensor:
    """`states_of` by all ranks of a group, a part of the positions each."""
    own = states_of(model, task, batch.part_of(group), device)
    whole = group.whole(own.to(device)).cpu()[:, : batch.labels.size]
    return whole.reshape(*batch.labels.shape, -1)


def logit_change(
    forward: Callable[[Batch], torch.Tensor],
    task: Task,
    packs: Sequence[Sequence[Example]],
    changed: int,
    pad_id: int,
    draw: int = 0,
    before: Sequence[torch.Tensor] | None = None,
) -> tuple[float, int]:
    """How far the logits of all other documents move when one of the first pack is changed.

    Args:
        forward: from a batch to its logits.
        changed: which document of the first pack is changed: each of its tokens but the ends becomes its neighbour in
            the vocabulary.
        draw: as `Task.collate` has it.
        before: the logits of each document of the packs as they are, where they are known.

    Returns:
        The largest change as a share of the largest logit, and the number of other documents.
    """
    if before is None:
        before = _by_document(task.collate(packs, pad_id, draw), forward)
    first = list(packs[0])
    ids = np.array(first[changed].input_ids)
    inner = slice(1, max(len(ids) - 1, 2))
    ids[inner] = np.where(ids[inner] > 0, ids[inner] - 1, ids[inner] + 1)
    other = [*first[:changed], replace(first[changed], input_ids=ids), *first[changed + 1 :]]
    after = _by_document(task.collate([other, *packs[1:]], pad_id, draw), forward)
    pairs = enumerate(zip(before, after, strict=True))
    moved = [float((one - two).abs().max()) for index, (one, two) in pairs if index != changed]
    largest = max(float(logits.abs().max()) for logits in before)
    return max(moved, default=0.0) / max(largest, 1e-30), len(moved)


def _by_document(batch: Batch, forward: Callable[[Batch], torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each document of a batch, padding left out."""
    logits = forward(batch)
    count = len(batch.rows)
    if batch.segments is not None:
        segments = torch.from_numpy(batch.segments)
        return [logits[segments == index] for index in range(count)]
    if batch.labels.ndim < 2 or logits.dim() != 3 or logits.shape[1] != batch.labels.shape[1]:
        return [logits[index] for index in range(count)]
    real = batch.labels != IGNORE if "target_ids" in batch.inputs else batch.inputs["attention_mask"]
    lengths = real.sum(1)
    return [logits[index, : int(lengths[index])] for index in range(count)]


def short_rows(shards: ShardSet, lengths: Array) -> list[Example]:
    """The shortest documents, each of a place of its own; the same on every rank.

    Args:
        lengths: theirs, or greater for those that shall not be taken.
    """
    count = min(DOCUMENTS, len(shards))
    chosen = np.argpartition(lengths, count - 1)[:count]
    rows = [shards.row(int(index)) for index in sorted(chosen)]
    return rows * 2 if len(rows) == 1 else rows


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        with beside_training(model):
            yield
    finally:
        model.train(was_training)
