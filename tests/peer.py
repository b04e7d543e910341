"""transformers' Trainer on a job's rows: the peer that training is compared with, in benchmarks and tests.

It reads the same tokenized rows, one to a line even where the job packs them. Its model computes the loss, and loop,
optimizer, clipping and schedule are its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import load_written
from trainers.batching.order import Order, job_order
from trainers.batching.packing import PackIndex, index_packs
from trainers.job.schema import Job
from trainers.model.engine import load_options
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.manifest import shards_folder
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tasks.base import IGNORE, Example
from trainers.tasks.causal import CausalTask
from trainers.tokenizer.encoder import Encoder, load_encoder


@dataclass(frozen=True)
class _Lines:
    """A map-style data set of the lines that the Trainer collates: (draw of the masks, rows)."""

    lines: list[tuple[int, list[Example]]]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[int, list[Example]]:
        return self.lines[int(index)]


def train_peer(
    job: Job, out: Path, in_order: bool = False, threads: int = 1, stop_after: int | None = None
) -> dict[int, float]:
    """Train a job's model with the Trainer; losses by step. The model and its tokenizer go to `out`.

    Args:
        in_order: each step gets the rows that the job gives it, and tokens hidden alike; questions are trained without
            padding among the choices. Else the Trainer shuffles and is left as it is.
        threads: of torch.
        stop_after: steps; the schedule is that of all of them.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    shards, encoder = load_written(job), load_encoder(job.model.path)
    assert shards is not None
    task = job_task(job, shards.train)
    task.prepare(encoder)
    rows = ShardSet(shards_folder(Folder(job.storage), shards.train.key), shards.train, task)
    packs = index_packs(job, rows)
    order = job_order(job, len(packs))
    lines = ordered(order, packs, rows) if in_order else [(0, [rows.row(index)]) for index in range(len(rows))]

    class Peer(Trainer):  # type: ignore[misc]  # transformers is not typed
        def _get_train_sampler(self, *given: Any) -> Any:
            if in_order:
                return torch.utils.data.SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(*given)

        def compute_loss(self, model: Any, inputs: Any, **given: Any) -> Any:
            if in_order and "start_positions" in inputs:
                return span_loss(model, **inputs)
            return super().compute_loss(model, inputs, **given)

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == stop_after:
                control.should_training_stop = True

    torch.manual_seed(job.train.seed)
    torch.set_num_threads(threads)
    model = task.load_model(job.model.path, pad_id=encoder.pad_id, **load_options(job))
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=1 if in_order else job.train.global_batch_size,
        max_steps=order.steps, learning_rate=job.train.learning_rate, lr_scheduler_type=job.train.schedule,
        warmup_steps=job.train.warmup_ratio, seed=job.train.seed, weight_decay=job.train.weight_decay,
        max_grad_norm=job.train.max_grad_norm, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1, log_level="error",
    )  # fmt: skip
    peer = Peer(
        model=model,
        args=arguments,
        train_dataset=_Lines(lines),
        data_collator=lambda batch: collate(task, batch, encoder),
        callbacks=[Stop()],
    )
    peer.remove_callback(PrinterCallback)
    peer.train()
    model.save_pretrained(out)
    encoder.tokenizer.save_pretrained(out)
    return {line["step"]: line["loss"] for line in peer.state.log_history if "loss" in line}


def ordered(order: Order, packs: PackIndex, rows: ShardSet) -> list[tuple[int, list[Example]]]:
    """Of each step the draw of its masks and its documents."""
    return [
        (step + 1, [rows.row(int(row)) for pack in order.step(step) for row in packs.pack(int(pack))])
        for step in range(order.steps)
    ]


def collate(task: Task, lines: list[tuple[int, list[Example]]], encoder: Encoder) -> dict[str, Any]:
    """Rows as tensors."""
    import torch

    draw = lines[0][0] or int(np.random.randint(1, 2**31))
    arrays = as_transformers(task, [row for _, rows in lines for row in rows], encoder, draw)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def as_transformers(task: Task, rows: list[Example], encoder: Encoder, draw: int) -> Mapping[str, Any]:
    """A batch as transformers' models want it: labels not shifted, padding masked."""
    made = task.collate([[row] for row in rows], encoder.pad_id, draw)
    if isinstance(task, CausalTask):
        assert made.segments is not None
        mask = (made.segments >= 0).astype(np.int64)
        return {"input_ids": made.inputs["input_ids"], "attention_mask": mask, "labels": unshifted(made.labels)}
    inputs = {name: array for name, array in made.inputs.items() if name != "target_ids"}
    if "answer_tokens" in rows[0].extra:
        return {**inputs, "start_positions": made.labels[:, 0], "end_positions": made.labels[:, 1]}
    if rows[0].extra.get("causal"):
        return {**inputs, "labels": unshifted(made.labels)}
    return {**inputs, "labels": made.labels}


def unshifted(labels: Any) -> Any:
    """Labels in their tokens' own places."""
    return np.concatenate([np.full_like(labels[:, :1], IGNORE), labels[:, :-1]], axis=1)


def span_loss(model: Any, start_positions: Any, end_positions: Any, **inputs: Any) -> Any:
    """Mean cross entropy of start and end, with no probability on padding, which the model class leaves there."""
    import torch
    from torch.nn.functional import cross_entropy

    found, padding = model(**inputs), inputs["attention_mask"] == 0
    sides = ((found.start_logits, start_positions), (found.end_logits, end_positions))
    return torch.stack(
        [cross_entropy(scores.masked_fill(padding, -torch.inf), place) for scores, place in sides]
    ).mean()
