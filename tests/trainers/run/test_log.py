"""events.jsonl and TensorBoard: one continuous curve, also after a kill and a restart."""

import errno
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import event_file_writer

from trainers.run.events import EvaluationEvent, HistoryEvent, StartEvent, StepEvent, read_events
from trainers.run.log import RunLog
from trainers.storage import Folder


def curve(folder: Path, tag: str, writer: str = "") -> dict[int, float]:
    """What TensorBoard shows for a tag of a writer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard" / writer), purge_orphaned_data=True)
    accumulator.Reload()
    steps = [event.step for event in accumulator.Scalars(tag)]
    assert steps == sorted(set(steps)), "a step is shown twice or out of order"
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def train(run: Folder, start: int, end: int, loss: float) -> None:
    log = RunLog(run)
    log.append(StartEvent(step=start, steps=10, world_size=2))
    for step in range(start + 1, end + 1):
        log.append(StepEvent(step=step, loss=loss, learning_rate=0.1))
    log.close()


def test_a_restart_hides_the_steps_that_are_done_again(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    train(run, 0, 6, loss=2.0)  # killed after step 6, with a checkpoint at 4
    train(run, 4, 8, loss=1.0)
    assert curve(tmp_path, "train/loss") == {step: 2.0 if step <= 4 else 1.0 for step in range(1, 9)}


def test_evaluations_stand_on_the_same_axis(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    train(run, 0, 4, loss=2.0)
    log = RunLog(run)
    log.append(EvaluationEvent(step=4, metrics={"accuracy": 0.5}))
    log.close()
    assert curve(tmp_path, "eval/accuracy", "eval") == {4: 0.5}


def test_a_line_that_a_kill_cut_short_is_left_out_and_not_joined_to_the_next(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    train(run, 0, 2, loss=2.0)
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "st')
    train(run, 2, 3, loss=1.0)
    assert [event.step for event in read_events(run) if event.kind == "step"] == [1, 2, 3]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert read_events(Folder(str(tmp_path))) == []


def test_steps_that_a_killed_controller_never_heard_of_come_back_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files within a second, numbers 9 to 11 of this process."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    run = Folder(str(tmp_path))
    train(run, 0, 3, loss=2.0)  # the controller died here; the ranks went on and committed step 6
    log = RunLog(run)
    steps = tuple(StepEvent(step=step, loss=1.0, learning_rate=0.1, time=5.0) for step in range(2, 7))
    log.append(HistoryEvent(events=steps))
    log.append(StartEvent(step=6, steps=10, world_size=2))
    log.close()
    assert curve(tmp_path, "train/loss") == {1: 2.0, 2: 2.0, 3: 2.0, 4: 1.0, 5: 1.0, 6: 1.0}
    assert [event.step for event in read_events(run) if event.kind == "step"] == [1, 2, 3, 4, 5, 6]


class FullDisk:
    """In the place of the log's stream: takes `room` bytes more, then nothing."""

    def __init__(self, stream: io.RawIOBase, room: int) -> None:
        self._stream, self.room = stream, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._stream.write(bytes(data[: self.room])) or 0
        self.room -= written
        return written

    def close(self) -> None:
        self._stream.close()


def test_a_full_disk_ends_nothing_and_its_lines_are_written_once_there_is_room(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(Folder(str(tmp_path)), say=said.append)
    disk = log._stream = FullDisk(log._stream, room=150)
    for step in range(1, 6):
        log.append(StepEvent(step=step, loss=1.0))
    assert len(said) == 1 and "No space left" in said[0] and "tried again" in said[0]
    disk.room = 10**6
    log.append(StepEvent(step=6, loss=1.0))
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_lines_that_are_missing_at_the_end_are_waited_for_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(Folder(str(tmp_path)), say=lambda line: None)
    disk = log._stream = FullDisk(log._stream, room=0)
    log.append(StepEvent(step=1, loss=1.0))
    threading.Timer(0.3, setattr, (disk, "room", 10**6)).start()
    log.settle()
    disk.room = 0
    log.append(StepEvent(step=2, loss=1.0))
    monkeypatch.setattr("trainers.patience.RETRY_S", 0.2)
    with pytest.raises(OSError, match=r"writing the last 1 lines of .*events\.jsonl"):
        log.close()
    log.close()


def test_curves_that_cannot_be_written_end_nothing_and_go_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr("trainers.run.log.CURVES_PAUSE_S", 0.0)
    log = RunLog(Folder(str(tmp_path)), say=said.append)
    log.append(StepEvent(step=1, loss=1.0))
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
        for step in (2, 3):
            log.append(StepEvent(step=step, loss=1.0))
        log.append(EvaluationEvent(step=3, metrics={"accuracy": 0.5}))
    log.append(StepEvent(step=4, loss=1.0))
    log.append(EvaluationEvent(step=4, metrics={"accuracy": 0.6}))
    log.close()
    assert len(said) == 1 and "TensorBoard" in said[0] and "gap" in said[0]
    assert {1, 4} <= set(curve(tmp_path, "train/loss"))
    assert curve(tmp_path, "eval/accuracy", "eval") == pytest.approx({3: 0.5, 4: 0.6})
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 6
