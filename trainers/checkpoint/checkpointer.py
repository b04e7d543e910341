"""One rank's side of saving and resuming: joins the buffer, the writer process and the readers for the loop.

A save is a copy to host memory, made beside the next step's forward and backward passes and waited for before its
update; the writer process does the rest, and `poll` tells of its end. Nothing here waits for storage in a step, except
a save that comes while the one before is still being written.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainers.checkpoint.cleaning import clean_leftovers
from trainers.checkpoint.host_buffer import Copying, HostBuffer
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, find_damage, open_newest
from trainers.checkpoint.records import CheckpointState, Progress, Save, SaveReport, SaveRequest
from trainers.checkpoint.slices import parameter_shapes, persistent_buffers, rank_share, restore_state, stage_of
from trainers.checkpoint.writer_link import WriterLink
from trainers.errors import TrainingError
from trainers.model.world import World
from trainers.run.folder import step_name
from trainers.storage import Folder

Emit = Callable[[Mapping[str, Any]], None]
STUCK_S = 240.0
"""How long a save waits for the one before; well below the ten minutes that the other ranks' next collective waits."""
SETTLE_S = 2.0
"""A writer begins when its rank's copy is that long over, or as long as the copy took."""
REST = 5.0
"""Writers of ranks that compute on the CPU work a sixth of the time: at full speed they slowed steps by 63 % here."""
LAST_S = 3600.0
"""How long the end of the run waits for the last commit; no collective is waiting then."""


@dataclass
class Checkpointer:
    """Saves and restores one engine."""

    engine: Any
    checkpoints: Folder
    world: World
    attempt: str
    """Names this launch; the same on every rank."""
    train_key: str
    job: str
    emit: Emit
    """Called on rank 0 only."""
    skipped: frozenset[int] = frozenset()
    """Steps, counted from 0, that made no update."""
    _writing: "_Writing | None" = None
    _copying: Copying | None = None
    _saves: int = 0
    _said: dict[str, Any] = field(default_factory=dict)
    """What the event of the save in flight will say besides its outcome."""

    def prepare(self) -> int:
        """Allocate the buffer and start the writer, once. Returns the bytes of host memory that all ranks hold."""
        if self._writing is None:
            self._writing = _prepare(self.engine, self.world)
        return self._writing.total_bytes

    def save(self, progress: Progress) -> None:
        """Begin to copy the state and have it written; waits only where the save before is not on storage yet."""
        self.prepare()
        assert self._writing is not None
        began = time.monotonic()
        self._settle(STUCK_S)
        waited = time.monotonic() - began
        self._saves += 1
        said: dict[str, Any] = {"step": progress.step, "began": began, "wait_s": waited}
        request, link = self._request(progress, self._writing.total_bytes), self._writing.link

        def hand_over(copied: float) -> None:
            said["copy_s"] = copied
            link.send(request.model_copy(update={"settle_s": min(copied, SETTLE_S)}))

        self._copying = self._writing.buffer.copy_beside(hand_over)
        said["blocked_s"] = time.monotonic() - began
        self._said = said

    def before_update(self) -> None:
        """Wait until the copy is made: the update changes what it reads."""
        if self._copying is None:
            return
        began = time.monotonic()
        self._copying.wait()
        self._copying = None
        self._said["blocked_s"] += time.monotonic() - began

    def _request(self, progress: Progress, total_bytes: int) -> SaveRequest:
        first = self.world.rank == 0
        return SaveRequest(
            save=Save(id=f"{self.attempt}-{self._saves}", rank=self.world.rank, world_size=self.world.size),
            step=progress.step,
            folder=str(self.checkpoints / step_name(progress.step)),
            total_bytes=total_bytes,
            settle_s=0.0,
            rest=REST if self.world.device.type == "cpu" else 0.0,
            state=state_record(self.engine, progress, self.train_key, self.job) if first else None,
            history=json.dumps(progress.history) if first else "[]",
        )

    def poll(self) -> None:
        """Tell what became of the save in flight, if that is known by now."""
        if self._copying is not None and not self._copying.over:
            return
        if self._writing is not None and self._writing.link.busy:
            self._tell(self._writing.link.hear())

    def finish(self) -> None:
        """Wait until the save in flight is committed, or lost."""
        self._settle(LAST_S)

    def _settle(self, limit_s: float) -> None:
        self.before_update()
        if self._writing is None or not self._writing.link.busy:
            return
        self._writing.link.hurry()
        report = self._writing.link.hear(limit_s)
        self._tell(report or self._writing.link.give_up(f"still not written {limit_s:g} s after the next was due"))

    def _tell(self, report: SaveReport | None) -> None:
        if report is None or self.world.rank:
            return
        if report.error:
            self.emit({"kind": "checkpoint_skipped", "step": report.step, "reason": report.error})
            return
        seconds = report.at - self._said.pop("began")
        self.emit({"kind": "checkpoint", **self._said, "seconds": seconds, "bytes": report.bytes})

    def resume(self) -> Progress:
        """Restore the newest committed checkpoint whose digests hold; step 0 where there is none."""
        self.finish()
        first = self.world.rank == 0
        if first:
            for step, reason in clean_leftovers(self.checkpoints):
                self.emit({"kind": "checkpoint_skipped", "step": step, "reason": reason})
        barrier(self.world)
        reader = open_newest(self.checkpoints, self._find_damage, self.emit if first else None)
        return self._restore(reader) if reader else Progress(0, 0)

    def _find_damage(self, files: LocalCopies) -> str | None:
        """Every rank checks its share of the files, and all hear what one of them found."""
        return first_word(find_damage(files, slice(self.world.rank, None, self.world.size)), self.world)

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

    def close(self) -> None:
        """End the writer and free its memory."""
        self.before_update()
        if self._writing is not None:
            self._writing.link.close()
            self._writing.buffer.close()
            self._writing = None


@dataclass(frozen=True)
class _Writing:
    """What saving needs, made once."""

    buffer: HostBuffer
    link: WriterLink
    total_bytes: int
    """Size of all ranks' buffers, which is that of their files."""


def _prepare(engine: Any, world: World) -> _Writing:
    import torch
    import torch.distributed as dist

    buffer = HostBuffer(rank_share(engine))
    total = torch.tensor(buffer.num_bytes, dtype=torch.int64, device=world.device)
    dist.all_reduce(total)
    return _Writing(buffer, WriterLink(buffer.descriptor), int(total))


def state_record(engine: Any, progress: Progress, train_key: str, job: str) -> CheckpointState:
    """What rank 0 writes down beside the numbers."""
    return CheckpointState(
        step=progress.step,
        world_size=engine.world_size,
        zero_stage=stage_of(engine),
        shapes=parameter_shapes(engine),
        trainable=tuple(name for name, p in engine.module.named_parameters() if p.requires_grad),
        tokens=progress.tokens,
        train_key=train_key,
        job=job,
    )


def new_attempt(world: World) -> str:
    """An id for this launch, the same on every rank."""
    import torch.distributed as dist

    shared = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(shared, src=0, device=world.device)
    return str(shared[0])


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
