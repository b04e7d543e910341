"""One rank's side of saving and resuming: joins slices, writing and reading to a `Saver` for the loop."""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainers.checkpoint.reading import CheckpointReader, committed_steps, find_damage, quarantine
from trainers.checkpoint.slices import copy_state, persistent_buffers, restore_state
from trainers.checkpoint.writing import Attempt, clean_uncommitted, commit, state_record, write_rank
from trainers.errors import TrainingError
from trainers.loop import Progress
from trainers.runs import step_name
from trainers.storage import Folder
from trainers.world import World

Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores one engine."""

    engine: Any
    checkpoints: Folder
    world: World
    attempt: Attempt
    train_key: str
    job: str
    emit: Emit
    """Called on rank 0 only."""
    skipped: frozenset[int] = frozenset()
    """Steps, counted from 0, that made no update."""

    def save(self, progress: Progress) -> None:
        """Commit the state; where storage refuses, that checkpoint is lost and the run goes on."""
        began, step = time.perf_counter(), progress.step
        folder = self.checkpoints / step_name(step)
        state = copy_state(self.engine)
        copied = time.perf_counter() - began
        write_rank(folder, self.attempt, state)
        if self.world.rank:
            return
        try:
            record = state_record(self.engine, step, progress.tokens, self.train_key, self.job)
            commit(folder, self.attempt, record, progress.history)
        except OSError as error:
            folder.delete()
            self.emit({"kind": "checkpoint_skipped", "step": step, "reason": str(error)})
            return
        seconds = time.perf_counter() - began
        self.emit({"kind": "checkpoint", "step": step, "seconds": seconds, "copy_s": copied})

    def resume(self) -> Progress:
        """Restore the newest committed checkpoint whose digests hold; step 0 where there is none."""
        if self.world.rank == 0:
            clean_uncommitted(self.checkpoints)
        barrier(self.world)
        for step in reversed(committed_steps(self.checkpoints)):
            folder = self.checkpoints / step_name(step)
            damage = first_word(find_damage(folder, slice(self.world.rank, None, self.world.size)), self.world)
            if damage is None:
                return self._restore(CheckpointReader(folder))
            if self.world.rank == 0:
                quarantine(self.checkpoints, step, damage)
                self.emit({"kind": "checkpoint_quarantined", "step": step, "reason": damage})
        return Progress(0, 0)

    def _restore(self, reader: CheckpointReader) -> Progress:
        state = reader.state
        if state.train_key != self.train_key or state.job != self.job:
            raise TrainingError(
                f"{reader.folder} was written by another job or from other data (shards {state.train_key}, now "
                f"{self.train_key}); remove the run folder to start over"
            )
        updates = state.step - sum(step < state.step for step in self.skipped)
        restore_state(self.engine, reader.read, updates)
        saved = dict(reader.buffers())
        for name, buffer in persistent_buffers(self.engine.module):
            buffer.copy_(saved[name])
        return Progress(state.step, state.tokens, tuple(reader.history()))


def new_attempt(world: World) -> Attempt:
    """An id for this launch, the same on every rank."""
    import torch.distributed as dist

    shared = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(shared, src=0, device=world.device)
    return Attempt(shared[0], world.rank, world.size)


def barrier(world: World) -> None:
    """Wait for every rank."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, device=world.device))


def first_word(word: str | None, world: World) -> str | None:
    """What the lowest rank that has something to say says; the same on every rank."""
    import torch.distributed as dist

    words: list[str | None] = [None] * world.size
    dist.all_gather_object(words, word)
    return next((one for one in words if one is not None), None)
