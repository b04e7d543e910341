"""One rank's side of saving and resuming: joins the buffer, the writer process and the readers for the loop.

A save is a copy to host memory, made beside the next step's forward and backward passes and waited for before its
update; the writer process does the rest, and `poll` tells of its end. Nothing here waits for storage in a step, except
a save that comes while the one before is still being written: it waits a while, and is then left out; and an update
under offloading, whose state is written from where it lies.
"""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainers.checkpoint.choosing import choose_checkpoint
from trainers.checkpoint.host_buffer import Beside, HostBuffer, OffloadedFile, make_buffer
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.records import CheckpointState, Progress, Save, SaveReport, SaveRequest, Vote
from trainers.checkpoint.slices import (
    is_offloaded,
    parameter_shapes,
    persistent_buffers,
    rank_share,
    restore_state,
    stage_of,
)
from trainers.checkpoint.writer_link import WriterLink
from trainers.errors import TrainingError
from trainers.model.world import World
from trainers.run.events import CheckpointEvent, CheckpointSkippedEvent, Event
from trainers.run.folder import step_name
from trainers.storage import Folder

Emit = Callable[[Event], None]
WAIT_S = 60.0
"""How long a save waits for the one before, once; after that it is left out, and the one before goes on."""
STUCK_S = 240.0
"""A writer from which nothing was heard for so long hangs, and is replaced."""
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
    start_over: bool = False
    """Begin at step 0 where every checkpoint is damaged."""
    committed: int | None = None
    """On rank 0, the step that was committed last."""
    _writing: "_Writing | None" = None
    _copying: Beside | None = None
    _saves: int = 0
    _event: dict[str, Any] = field(default_factory=dict)
    """What the event of the save in flight will say besides its outcome."""
    _left_out: Progress | None = None
    """A save that was left out, while the state is still that of its step."""
    _waited: bool = False
    """Whether a save has waited for the one in flight already."""

    def prepare(self) -> int:
        """Allocate the buffer and start the writer, once. Returns the bytes of host memory that all ranks hold."""
        if self._writing is None:
            share = rank_share(self.engine)
            source = OffloadedFile(share) if is_offloaded(self.engine) else make_buffer(share, self.world)
            sizes = self.world.gather((source.num_bytes, source.file_bytes))
            self._writing = _Writing(source, WriterLink(source.descriptor), *map(sum, zip(*sizes, strict=True)))
        return self._writing.host_bytes

    def save(self, progress: Progress) -> None:
        """Begin to copy the state and have it written.

        Where the save before is not on storage yet, this one waits for it, once, and is left out if it takes longer:
        a save that is given up for the next one might never end. A writer that shows no sign of life is replaced.
        """
        self.prepare()
        assert self._writing is not None
        began = time.monotonic()
        self._settle(0.0 if self._waited else WAIT_S)
        self._waited = any(self.world.gather(self._writing.link.busy))
        waited = time.monotonic() - began
        if self._waited:
            self._left_out = progress
            self._skip(progress.step, f"the save before is still being written after {waited:.0f} s more; it goes on")
            return
        self._saves += 1
        event: dict[str, Any] = {"step": progress.step, "began": began, "wait_s": waited}
        request, link = self._request(progress, self._writing.file_bytes), self._writing.link

        def hand_over(copied: float, written: Vote | None = None) -> None:
            event["copy_s"] = copied
            link.send(request.model_copy(update={"settle_s": min(copied, SETTLE_S), "written": written}))

        source = self._writing.source
        if isinstance(source, OffloadedFile):
            self._copying = source.write_beside(request, hand_over)
        else:
            self._copying = source.copy_beside(hand_over)
        event["blocked_s"] = time.monotonic() - began
        self._event = event

    @property
    def reading(self) -> bool:
        """Whether a save still reads the state."""
        return self._copying is not None and not self._copying.over

    def before_update(self) -> None:
        """Wait until the copy is made: the update changes what it reads."""
        self._left_out = None
        if self._copying is None:
            return
        began = time.monotonic()
        self._copying.wait()
        self._copying = None
        self._event["blocked_s"] += time.monotonic() - began

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
            history=json.dumps([step.model_dump(mode="json") for step in progress.history]) if first else "[]",
        )

    def poll(self) -> None:
        """Tell what became of the save in flight, if that is known by now."""
        if self.reading:
            return
        if self._writing is not None and self._writing.link.busy:
            self._tell(self._writing.link.hear())

    def finish(self) -> None:
        """Wait until the save in flight is committed, or lost; then make the save that was left out for it."""
        self._settle(LAST_S)
        if self._left_out is not None:
            progress, self._left_out, self._waited = self._left_out, None, False
            self.save(progress)
            self._settle(LAST_S)

    def _settle(self, limit_s: float) -> None:
        """Hear what became of the save in flight within a limit; one whose writer hangs is given up."""
        if self._copying is not None:
            self._copying.wait()
            self._copying = None
        if self._writing is None or not self._writing.link.busy:
            return
        link, began = self._writing.link, time.monotonic()
        link.hurry()
        while link.busy:
            seconds_left = limit_s - (time.monotonic() - began)
            report = link.hear(min(max(seconds_left, 0.0), 1.0))
            if report is None and link.silent_s > STUCK_S:
                report = link.give_up(f"nothing was heard of its writer for {STUCK_S:g} s")
            if report is None and seconds_left <= 0 and limit_s == LAST_S:
                report = link.give_up(f"still not written after {LAST_S:g} s")
            self._tell(report)
            if seconds_left <= 0:
                return

    def _skip(self, step: int, reason: str) -> None:
        if self.world.rank == 0:
            self.emit(CheckpointSkippedEvent(step=step, reason=reason))

    def _tell(self, report: SaveReport | None) -> None:
        if report is None or self.world.rank:
            return
        if report.error:
            self._skip(report.step, report.error)
            return
        self.committed = report.step
        seconds = report.at - self._event.pop("began")
        self.emit(CheckpointEvent(**self._event, seconds=seconds, bytes=report.bytes))

    def resume(self) -> Progress:
        """Restore the newest committed checkpoint whose digests hold, the same on every rank; step 0 if none.

        Raises:
            OSError: where a rank cannot read it now; it may be read after a restart.
            TrainingError: where it belongs to another job, or every checkpoint is damaged.
        """
        self.finish()
        reader = choose_checkpoint(self.checkpoints, self.world, self.emit, self.start_over)
        return self._restore(reader) if reader else Progress(0, 0)

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
            self._writing.source.close()
            self._writing = None


@dataclass(frozen=True)
class _Writing:
    """What saving needs, made once."""

    source: HostBuffer | OffloadedFile
    link: WriterLink
    host_bytes: int
    """What saving holds of host memory, over all ranks."""
    file_bytes: int
    """Size of all ranks' files."""


def state_record(engine: Any, progress: Progress, train_key: str, job: str) -> CheckpointState:
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
    return world.broadcast(uuid.uuid4().hex[:12])
