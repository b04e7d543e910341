"""Which checkpoints may be deleted, and the one owner that deletes them: the controller, or rank 0 without one."""

import shutil
from collections.abc import Collection

from trainers.checkpoint.cleaning import remove_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.run.events import CheckpointEvent, CheckpointQuarantinedEvent, Event
from trainers.storage import Folder


def deletable(committed: Collection[int], keep: int, pinned: Collection[int]) -> list[int]:
    """Steps that may go: neither among the newest `keep`, nor pinned. Pure.

    Args:
        committed: steps with a commit marker, in any order.
        keep: at least 1, so the newest always stays.
        pinned: the best, those that the registry promoted, those in use.
    """
    newest = set(sorted(committed)[-keep:])
    return [step for step in sorted(committed) if step not in newest and step not in pinned]


class KeptCheckpoints:
    """The committed checkpoints of one run: listed once, then followed by events, for a listing costs requests."""

    def __init__(self, folder: Folder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self.steps = set(committed_steps(folder))
        self._bytes = 0
        """Size of one checkpoint, once it is known."""
        self._going: set[int] = set()
        """To be deleted, which storage did not do so far."""

    def note(self, event: Event) -> None:
        """Follow a commit, or a checkpoint that was set aside."""
        if isinstance(event, CheckpointEvent):
            self.steps.add(event.step)
            self._bytes = max(self._bytes, event.bytes)
        elif isinstance(event, CheckpointQuarantinedEvent):
            self.steps.discard(event.step)

    def prune(self, pinned: Collection[int], unevaluated: Collection[int] = ()) -> None:
        """Delete what nothing needs any more; see `deletable`.

        Args:
            unevaluated: stay as well while two more checkpoints have room on the disk; the oldest go first.
        """
        for step in deletable(self.steps, self._keep, pinned):
            if step in unevaluated and self._has_room():
                continue
            self._going.add(step)
            self.steps.discard(step)
        for step in sorted(self._going):
            if not remove_checkpoint(self._folder, step):
                return  # storage fails for a moment: those that are left wait for the next time
            self._going.discard(step)

    def _has_room(self) -> bool:
        try:
            return not self._folder.is_local or shutil.disk_usage(self._folder.path).free > 2 * self._bytes
        except OSError:  # storage fails for a moment: nothing is deleted for it
            return True
