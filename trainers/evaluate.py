"""Evaluates one model folder on the evaluation shards, every row exactly once. No Ray, no process group."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainers.batch_plan import AUTO_MICRO_BATCH_TOKENS
from trainers.data.dataset import ShardSet
from trainers.data.packing import PackIndex
from trainers.data.tokenizer import load_encoder
from trainers.engine import load_options
from trainers.errors import EvaluationError
from trainers.job import Job
from trainers.rank import index_packs
from trainers.tasks import Task
from trainers.tasks.base import Array, Row


def evaluate_model(
    job: Job, task: Task, model_path: str, shards: ShardSet, on_progress: Callable[[float], None] | None = None
) -> tuple[Array, dict[str, Array]]:
    """Run the model over every row.

    Args:
        on_progress: called with the share done, 0 to 1.

    Returns:
        rows, int64 [rows], ascending; and what `Task.judge` said of each, aligned with it.

    Raises:
        EvaluationError: where a row is missing or counted twice.
    """
    import torch

    device = _device(job.scale.cpus_per_worker)
    pad_id = load_encoder(model_path, job.model.trust_remote_code).pad_id
    model: Any = task.load_model(model_path, pad_id=pad_id, **load_options(job)).to(device).eval()
    packs = index_packs(job, shards)
    rows: list[Array] = []
    judged: list[dict[str, Array]] = []
    done = 0
    with torch.inference_mode():
        for group in _groups(packs, shards, job):
            batch = task.collate(group, pad_id)
            inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
            judged.append(task.judge(model(**inputs, **task.forward_options).logits, batch))
            rows.append(batch.rows)
            done += len(group)
            if on_progress:
                on_progress(done / len(packs))
    return _in_order(rows, judged, len(shards.lengths))


def _device(threads: int) -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.set_num_threads(threads)
    return torch.device("cpu")


def _groups(packs: PackIndex, shards: ShardSet, job: Job) -> Iterator[list[list[Row]]]:
    """Sequences of similar length together, as many as `evaluate.batch_size` and the token bound allow."""
    lengths = packs.sums(shards.lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(job.evaluate.batch_size, AUTO_MICRO_BATCH_TOKENS // longest), 1)
        yield [[shards.row(int(row)) for row in packs.pack(int(pack))] for pack in order[start : start + size]]
        start += size


def _in_order(rows: list[Array], judged: list[dict[str, Array]], expected: int) -> tuple[Array, dict[str, Array]]:
    places = np.concatenate(rows)
    order = np.argsort(places, kind="stable")
    if not np.array_equal(places[order], np.arange(expected)):
        raise EvaluationError(
            f"the evaluation saw {len(np.unique(places))} of {expected} rows in {len(places)} results"
        )
    return places[order], {name: np.concatenate([one[name] for one in judged])[order] for name in judged[0]}
