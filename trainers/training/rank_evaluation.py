"""Evaluation on the ranks: between two steps they score the state that they hold, sharded as it is.

For clusters whose devices are all taken, and for models that no single device holds. Rows are batched as they are
beside the training, and each rank takes every N-th batch, so the numbers are the same. A sharded model's weights are
gathered for each forward pass, so all ranks take equally many: one without a batch of its own repeats the last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainers.architecture import plain_model
from trainers.checkpoint.export import trained_generation
from trainers.checkpoint.slices import full_weight
from trainers.evaluation.device import computed_on
from trainers.evaluation.evaluate import SetBatches, SetScores, done_evaluation, keep_scores, plan_sets
from trainers.evaluation.selection import BASELINE
from trainers.model.lora import merged_adapters
from trainers.model.world import World
from trainers.model.zero_passes import beside_training
from trainers.patience import retrying
from trainers.records import StopReason
from trainers.run.folder import evaluation_event, failed_evaluation, read_evaluations, write_evaluation
from trainers.run.record import Run
from trainers.tasks import Task
from trainers.tokenizer.encoder import Encoder
from trainers.training.hooks import Hooks, Saver
from trainers.training.loop import agree_to_stop

LEAVING: tuple[StopReason, ...] = ("preempted", "resize")
"""Reasons to stop at once: the next launch begins with the evaluation that was given up."""


@dataclass
class RankEvaluation:
    """Evaluates the steps of one launch; every rank has one, and calls it alike."""

    run: Run
    task: Task
    encoder: Encoder
    engine: Any
    world: World
    hooks: Hooks
    saver: Saver
    resumed: int
    """The step this launch began with, whose checkpoint is committed."""
    _batches: SetBatches = field(init=False)
    _done: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._batches = plan_sets(self.run.job, self.task, self.run.open_held(self.task), self.encoder)
        known = read_evaluations(self.run.folder, self.run.shards.eval.key) if self.world.rank == 0 else []
        self._done = {record.step for record in known if record.status == "done"}
        if self.resumed == 0:  # others are of an earlier training, whose checkpoints are all set aside
            self._done &= {BASELINE}

    def __call__(self, step: int) -> None:
        """Evaluate the state after `step` steps, once it is committed; nothing where that is done, or a stop is near.

        Step 0 is the pretrained model, which is compared with where it has the task's head.
        """
        if self.world.broadcast(step in self._done) or (step == 0 and self.task.new_head):
            return
        began = time.perf_counter()
        scores = self._score_share(step)
        if scores is None:
            return
        shares = self.world.gather(scores)
        self.saver.finish()
        if self.world.rank == 0 and step in (self.resumed, self.saver.committed):
            self._keep(step, shares, time.perf_counter() - began)

    def _score_share(self, step: int) -> SetScores | None:
        """This rank's scores; None where the ranks were asked to leave."""
        found, last, group = self._batches.nothing(), len(self._batches) - 1, self.world.group
        ranks = group.size if group else 1  # that take a batch together
        first, size = self.world.rank // ranks, self.world.size // ranks
        with evaluated(self.engine, self.run.job.model.lora) as model:
            if step:
                self._generate_as_exported(model)
            for number in range(first, size * -(-len(self._batches) // size), size):
                self.hooks.at("evaluate", step)
                self.saver.poll()
                reason = self.hooks.stop_reason()
                if agree_to_stop(reason if reason in LEAVING else None, self.world):
                    return None
                name, rows, numbers = self._batches.score(min(number, last), model, self.world.device, group)
                if number <= last and (group is None or group.place == 0):
                    found[name].add(rows, numbers)
        return found

    def _generate_as_exported(self, model: Any) -> None:
        """End texts where the exported model does."""
        plain, serving = plain_model(model), self.task.serving(self.encoder)
        settings = trained_generation(serving, plain.config, Path(self.run.model.path))
        if settings is not None:
            plain.generation_config = settings

    def _keep(self, step: int, shares: list[SetScores], seconds: float) -> None:
        """Commit the record, on rank 0; whatever the metrics raise belongs into it."""
        key = self.run.shards.eval.key
        try:
            keep = partial(keep_scores, self.run, self.task, step, shares, computed_on(self.world.device))
            measured = retrying(keep, f"writing the scores of step {step}")
            record = done_evaluation(step, key, measured, seconds)
        except Exception as error:
            record = failed_evaluation(step, key, error)
        write_evaluation(self.run.folder, record)
        self._done.add(step)
        self.hooks.emit(evaluation_event(record, held_s=seconds))


@contextmanager
def evaluated(engine: Any, lora: Any) -> Iterator[Any]:
    """The engine's model in evaluation mode, for a while; adapters count as the export merges them. Compiled layers
    compute as they are, or each length of a text would be compiled."""
    import torch

    model = engine.module
    model.eval()
    merged = merged_adapters(model, lora, partial(full_weight, engine)) if lora else nullcontext()
    try:
        with torch.compiler.set_stance("force_eager"), merged, beside_training(engine):
            yield model
    finally:
        model.train()


def elsewhere(step: int) -> None:
    """In the place of `RankEvaluation` where evaluations run beside the training."""
