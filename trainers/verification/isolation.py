"""Whether documents that share a sequence can see each other: asked of the model itself, once, before the first step.

Several short documents are packed, one of them is changed, and no logit of another may move. What masks them depends on
the architecture, the attention backend and the library's version, so no list of safe combinations is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from trainers.errors import TrainingError
from trainers.shards.dataset import ShardSet
from trainers.tasks import Example, Task

DOCUMENTS = 3
TOLERANCE = 1e-5
"""Share of the largest logit that rounding may move; a leak moves logits by tenths (0.39 in a packed Llama)."""


def check_isolation(model: Any, task: Task, shards: ShardSet, pad_id: int, backend: str, device: Any) -> None:
    """Change one packed document and look at the logits of the others. Every rank calls this with the same shards.

    Args:
        model: the engine, or any model; its mode is restored afterwards.
        backend: the job's attention backend, for the message.

    Raises:
        TrainingError: where a document sees another.
    """
    rows = _short_rows(shards)
    with _evaluating(model):
        for changed in (0, len(rows) - 1):  # what follows must not see it, nor what stands before
            moved = logit_change(lambda inputs: _logits(model, task, inputs, device), task, rows, changed, pad_id)
            if moved > TOLERANCE:
                raise TrainingError(
                    f"packed documents see each other: changing document {changed + 1} of {len(rows)} moved logits of "
                    f"the others by {moved:.3g} of the largest. The attention backend (model.attention: {backend}) "
                    "does not keep them apart in this model: choose another, such as sdpa, or set data.packing: false"
                )


def logit_change(
    forward: Callable[[Mapping[str, Any]], Any], task: Task, rows: list[Example], changed: int, pad_id: int
) -> float:
    """How far the logits of the other documents move when one is changed, as a share of the largest logit.

    Args:
        forward: from a batch's inputs to logits, float [1, seq, ...].
        rows: the documents of one sequence.
        changed: which of them is changed.
    """
    ids = rows[changed].input_ids
    other = replace(rows[changed], input_ids=np.where(ids > 0, ids - 1, ids + 1))
    plain, altered = (task.collate([pack], pad_id) for pack in (rows, [*rows[:changed], other, *rows[changed + 1 :]]))
    assert plain.segments is not None, f"{type(task).__name__} packs but does not say where documents end"
    watched = (plain.segments[0] >= 0) & (plain.segments[0] != changed)
    before, after = (np.asarray(forward(batch.inputs))[0][watched] for batch in (plain, altered))
    largest = float(np.abs(before).max())
    return float(np.abs(before - after).max()) / max(largest, 1e-30)


def _short_rows(shards: ShardSet) -> list[Example]:
    """The shortest documents, each of a place of its own; the same on every rank."""
    count = min(DOCUMENTS, len(shards))
    chosen = np.argpartition(shards.lengths, count - 1)[:count]
    rows = [shards.row(int(index)) for index in sorted(chosen)]
    return rows * 2 if len(rows) == 1 else rows


def _logits(model: Any, task: Task, inputs: Mapping[str, Any], device: Any) -> Any:
    import torch

    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    with torch.no_grad():
        return model(**tensors, **task.forward_options).logits.float().cpu().numpy()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
