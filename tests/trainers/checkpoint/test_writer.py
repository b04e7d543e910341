"""The process beside a rank: the rank goes on meanwhile, and outlives whatever happens to it."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.crashing import is_alive, make_engine, state_digest
from tests.ranks import run_ranks
from trainers import host_memory
from trainers.checkpoint import host_buffer
from trainers.checkpoint.cleaning import clean_leftovers, finish_removals
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.host_buffer import HostBuffer
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader, committed_steps
from trainers.checkpoint.records import COMMITTED, CheckpointState, Save, SaveReport, SaveRequest
from trainers.checkpoint.slices import Piece, RankShare
from trainers.checkpoint.writer import carry_out
from trainers.checkpoint.writer_link import WriterLink
from trainers.errors import TrainingError
from trainers.run.folder import step_name
from trainers.storage import Folder
from trainers.tensor_file import TensorSpec


class OneRank:
    """A rank alone, whose state is one parameter of the value of the step."""

    def __init__(self, folder: Path, values: int = 1000) -> None:
        self.checkpoints = Folder(str(folder / "checkpoints"))
        self.value, self.values = torch.zeros(values), values
        spec = TensorSpec("weight/w", "float32", (values,))
        self.buffer = HostBuffer(RankShare((Piece(spec, lambda: self.value),), {"w": 0}))
        self.link = WriterLink(self.buffer.descriptor)

    def save(self, step: int) -> None:
        self.link.send(self.request(step))

    def request(self, step: int) -> SaveRequest:
        self.value.fill_(step)
        self.buffer.copy_beside(lambda _: None).wait()
        state = CheckpointState(step=step, world_size=1, zero_stage=3, shapes={"w": [self.values]}, trainable=("w",),
                                tokens=0, train_key="k", job="j")  # fmt: skip
        return SaveRequest(
            save=Save(id=f"a-{step}", rank=0, world_size=1), step=step, total_bytes=self.buffer.num_bytes,
            folder=str(self.checkpoints / step_name(step)), state=state,
        )  # fmt: skip

    def wait(self) -> SaveReport:
        report = self.link.hear(30)
        assert report is not None
        return report

    def saved(self, step: int) -> torch.Tensor:
        files = LocalCopies(self.checkpoints / step_name(step))
        assert find_damage(files) is None
        values: torch.Tensor = CheckpointReader(files).read("weight", "w", 0, self.values)
        return values


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[OneRank]:
    one = OneRank(tmp_path)
    yield one
    one.link.close()


def test_a_save_that_was_half_taken_back_is_no_checkpoint(rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest was written, its marker was refused, and its writer was killed while it deleted."""
    write = Folder.write_bytes

    def refuse_marker(folder: Folder, name: str, data: bytes) -> None:
        if name == COMMITTED:
            raise OSError(errno.ENOSPC, "no room")
        write(folder, name, data)

    def killed(path: Path, **_: Any) -> None:
        next(Path(path).glob("rank-*.safetensors")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_bytes", refuse_marker)
        patch.setattr("shutil.rmtree", killed)
        data = memoryview(rank.buffer._map[:])
        report = carry_out(rank.request(1), data, threading.Event(), bool)
        assert "no room" in str(report.error)
    assert clean_leftovers(rank.checkpoints) == [] and committed_steps(rank.checkpoints) == []
    finish_removals()
    assert list(rank.checkpoints.path.iterdir()) == []


def test_training_goes_on_while_pages_are_locked_and_the_first_copy_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def lock(*_: Any) -> None:
        begun.set()
        go_on.wait(30)

    monkeypatch.setattr(host_buffer, "lock_pages", lock)
    weight = torch.ones(10)
    buffer = HostBuffer(RankShare((Piece(TensorSpec("weight/w", "float32", (10,)), lambda: weight),), {"w": 0}))
    assert begun.wait(30)
    copy = threading.Thread(target=lambda: buffer.copy_beside(lambda _: None).wait(), daemon=True)
    copy.start()
    copy.join(0.2)
    assert copy.is_alive()
    go_on.set()
    copy.join(30)
    assert not copy.is_alive() and buffer._map[-4:] == np.float32(1).tobytes()


def test_pages_of_the_buffer_are_mapped_before_the_first_copy() -> None:
    spec = TensorSpec("weight/w", "float32", (2**20,))
    buffer = HostBuffer(RankShare((Piece(spec, lambda: torch.zeros(2**20)),), {"w": 0}))
    buffer._locked.wait()
    start = torch.frombuffer(buffer._map, dtype=torch.uint8).data_ptr()
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{start:x}-") for line in lines)
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert resident * 1024 >= buffer.num_bytes


def test_what_was_copied_is_written_whatever_the_rank_does_next(rank: OneRank) -> None:
    os.kill(rank.link.process.pid, signal.SIGSTOP)
    rank.save(1)
    assert rank.link.hear() is None
    rank.value.fill_(99)
    os.kill(rank.link.process.pid, signal.SIGCONT)
    assert rank.wait().error is None
    assert rank.saved(1).eq(1).all()
    assert not rank.link.busy


def test_a_writer_that_dies_once_is_replaced_and_the_save_goes_through(rank: OneRank) -> None:
    os.kill(rank.link.process.pid, signal.SIGSTOP)
    rank.save(1)
    first = rank.link.process.pid
    os.kill(first, signal.SIGKILL)
    assert rank.wait().error is None
    assert rank.link.process.pid != first
    assert rank.saved(1).eq(1).all()


def test_a_save_that_keeps_killing_its_writer_is_given_up_and_the_next_one_works(rank: OneRank) -> None:
    os.kill(rank.link.process.pid, signal.SIGSTOP)
    rank.save(1)
    for _ in range(2):
        killed = rank.link.process.pid
        os.kill(killed, signal.SIGKILL)
        while rank.link.process.pid == killed:
            assert rank.link.hear(0.01) is None
    assert "died 2 times (signal 9)" in str(rank.wait().error)
    assert committed_steps(rank.checkpoints) == []
    rank.save(2)
    assert rank.wait().error is None
    assert committed_steps(rank.checkpoints) == [2]


def test_a_writer_that_hangs_is_ended_and_the_next_save_works(rank: OneRank) -> None:
    stuck = rank.link.process.pid
    os.kill(stuck, signal.SIGSTOP)
    rank.save(1)
    assert rank.link.hear(0.2) is None
    assert rank.link.give_up("too slow") == SaveReport(step=1, error="too slow")
    assert not is_alive(stuck)
    rank.save(2)
    assert rank.wait().error is None
    assert committed_steps(rank.checkpoints) == [2]


def test_a_step_that_is_committed_is_never_written_over(rank: OneRank) -> None:
    rank.save(1)
    assert rank.wait().error is None
    again = WriterLink(os.dup(rank.buffer.descriptor))
    request = SaveRequest(save=Save(id="b-1", rank=0, world_size=1), step=1, total_bytes=1, history="[]",
                          folder=str(rank.checkpoints / step_name(1)), state=CheckpointReader(
                              LocalCopies(rank.checkpoints / step_name(1))).state)  # fmt: skip
    again.send(request)
    report = again.hear(30)
    again.close()
    assert report is not None and "committed already" in str(report.error)
    assert rank.saved(1).eq(1).all()


def test_a_node_that_can_never_hold_its_ranks_is_refused_and_one_that_is_full_now_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight ranks see the same memory: their sum counts, and only what cannot change is refused."""
    monkeypatch.setattr(host_buffer, "FREED_WITHIN_S", 0.0)
    monkeypatch.setattr(host_buffer, "memory_limit", lambda: 30_000)
    monkeypatch.setattr(host_buffer, "memory_available", lambda: 10_000)
    assert host_buffer.find_shortage(8_000, 8) is None
    full = host_buffer.find_shortage(8 * 2_000, 8)
    assert isinstance(full, MemoryError), "a restart may find the memory of the ranks before freed"
    assert "the 8 ranks of this node need 16,000 bytes for that, 10,000 are available" in str(full)
    never = host_buffer.find_shortage(8 * 5_000, 8)
    assert isinstance(never, TrainingError) and "need 40,000 bytes for that, and it has 30,000" in str(never)


def test_memory_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1_000, 2_000, 9_000])
    monkeypatch.setattr(host_buffer, "memory_available", lambda: next(free))
    assert host_buffer.find_shortage(5_000, 1) is None


@pytest.mark.parametrize("names", host_memory.FILES)
def test_the_container_limit_counts_not_the_machine(tmp_path: Path, names: tuple[str, str, str]) -> None:
    limit, usage, cache = names
    top = tmp_path / ("" if limit == "memory.max" else "memory")
    own = tmp_path / "own"
    own.write_text("0::/pod/box\n" if limit == "memory.max" else "4:memory:/pod/box\n")
    for group, value in ((top / "pod", "5000"), (top / "pod" / "box", "max")):
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(value)
        (group / usage).write_text("3000")
        (group / "memory.stat").write_text(f"anon 2000\n{cache} 1000\n")
    assert list(host_memory._limits(tmp_path, own)) == [(5000, 2000)]


def test_the_copy_thread_takes_its_device_before_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread stands on GPU 0; a stream of another GPU would leave a context there."""
    calls: list[Any] = []

    class Stream:
        device = "cuda:3"

        def wait_stream(self, _: Any) -> None:
            pass

        def synchronize(self) -> None:
            calls.append("synchronize")

    @contextlib.contextmanager
    def use(stream: Any) -> Iterator[None]:
        calls.append(("stream", stream.device, threading.current_thread().name))
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: calls.append(("device", d, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    host_buffer.Beside(host_buffer.Copying([], host_buffer.copy_stream(), lambda _: None)).wait()
    assert calls == [("device", 3, "copy"), ("stream", "cuda:3", "copy"), "synchronize"]


def save_twice(place: str) -> list[dict[str, Any]]:
    """Two saves of a real engine, the writer held up over the first; the events."""
    from trainers.checkpoint.checkpointer import WAIT_S, Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width=64)
    engine.backward(engine(torch.ones(4, 64)).square().mean())
    engine.step()
    events: list[Any] = []
    agent = Checkpointer(engine, Folder(place), world, new_attempt(world), "key", "job", events.append)
    agent.prepare()
    assert agent._writing is not None
    link = agent._writing.link
    hurry, writer = link.hurry, link.process.pid
    os.kill(writer, signal.SIGSTOP)
    began = time.perf_counter()
    agent.save(Progress(1, 10))
    agent.poll()
    assert time.perf_counter() - began < WAIT_S / 2 and not events

    def let_go() -> None:
        """The second save has begun to wait."""
        time.sleep(0.5)
        os.kill(writer, signal.SIGCONT)
        hurry()

    link.hurry = let_go  # type: ignore[method-assign]
    agent.save(Progress(2, 20))
    link.hurry = hurry  # type: ignore[method-assign]
    agent.finish()
    agent.close()
    return events


@pytest.mark.slow
def test_a_save_waits_for_the_one_before_and_says_how_long(tmp_path: Path) -> None:
    ((first, second),) = run_ranks(save_twice, 1, str(tmp_path))
    assert (first.kind, first.step, second.step) == ("checkpoint", 1, 2)
    assert first.wait_s < 0.5 <= second.wait_s < 60
    for event in (first, second):
        assert event.blocked_s >= 0
        assert event.seconds >= event.copy_s
        assert event.bytes > 12 * 4 * (64 * 64 + 64)
    assert committed_steps(Folder(str(tmp_path))) == [1, 2]


def save_faster_than_the_storage_writes(place: str) -> tuple[list[Any], list[int]]:
    """Saves that come while the one before is being written, slowly or not at all; the events, and what is committed
    before the end."""
    from trainers.checkpoint import checkpointer
    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width=64)
    engine.backward(engine(torch.ones(4, 64)).square().mean())
    engine.step()
    events: list[Any] = []
    agent = Checkpointer(engine, Folder(place), world, new_attempt(world), "key", "job", events.append)
    agent.prepare()
    assert agent._writing is not None
    link = agent._writing.link
    checkpointer.WAIT_S = 0.2
    for step in (1, 3):
        os.kill(link.process.pid, signal.SIGSTOP)
        agent.save(Progress(step, 10))
        agent.save(Progress(step + 1, 10))  # left out: the one before goes on
        if step == 1:
            agent.before_update()  # the state of step 2 is gone
            os.kill(link.process.pid, signal.SIGCONT)
            while link.busy:
                agent.poll()
    os.kill(link.process.pid, signal.SIGCONT)
    agent.finish()
    committed = committed_steps(Folder(place))
    os.kill(link.process.pid, signal.SIGSTOP)
    checkpointer.STUCK_S = 0.5
    agent.save(Progress(5, 10))
    agent.before_update()  # the writer has it
    time.sleep(0.6)
    agent.save(Progress(6, 10))  # nothing was heard of that writer for too long
    checkpointer.STUCK_S = 240.0
    agent.finish()
    agent.close()
    return events, committed


@pytest.mark.slow
def test_a_slow_save_is_finished_and_the_next_left_out_a_hanging_one_is_given_up(tmp_path: Path) -> None:
    ((events, committed),) = run_ranks(save_faster_than_the_storage_writes, 1, str(tmp_path))
    assert committed == [1, 3, 4], "of the last step the save is made up for at the end"
    assert committed_steps(Folder(str(tmp_path))) == [1, 3, 4, 6]
    skipped = {event.step: event.reason for event in events if event.kind == "checkpoint_skipped"}
    assert skipped.keys() == {2, 4, 5}
    assert "still being written" in skipped[2] and "nothing was heard of its writer" in skipped[5]
    assert [event.step for event in events if event.kind == "checkpoint"] == [1, 3, 4, 6]


class Squares:
    """An objective over the engine's own output."""

    def step_loss(self, model: Any, inputs: Any, labels: Any, targets: Any) -> Any:
        return model(inputs["x"]).square().sum()


def save_beside_a_step(place: str, waits: bool) -> tuple[bool, bool]:
    """A save whose copy takes longer than the next step: is the state of the save in the checkpoint, and did the step
    change it?"""
    from trainers.batching.batches import StepBatch
    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.host_buffer import Copying
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world
    from trainers.tasks.base import Batch
    from trainers.training.loop import run_micro_batches

    world = join_world(1)
    engine = make_engine(world, width=64)
    micro = Batch({"x": np.ones((4, 64), np.float32)}, np.zeros(4), np.arange(4))
    step = StepBatch((micro,), targets=4, tokens=4)
    run_micro_batches(engine, Squares(), step, world, lambda: None)
    agent = Checkpointer(engine, Folder(place), world, new_attempt(world), "key", "job", lambda _: None)
    copy, go_on = Copying.__call__, threading.Event()
    Copying.__call__ = lambda self: (go_on.wait(60), copy(self))[1]  # type: ignore[method-assign]

    def before_update() -> None:
        if waits:
            threading.Timer(1.0, go_on.set).start()
            agent.before_update()

    before = state_digest(engine)
    agent.save(Progress(1, 4))
    run_micro_batches(engine, Squares(), step, world, before_update)
    after = state_digest(engine)
    go_on.set()
    agent.finish()
    agent.resume()
    restored = state_digest(engine)
    agent.close()
    return restored == before, before != after


@pytest.mark.slow
@pytest.mark.parametrize("waits", [True, False])
def test_an_update_waits_for_the_copy_of_the_state(tmp_path: Path, waits: bool) -> None:
    """Where it does not wait, the checkpoint holds another state: the test would see it."""
    assert run_ranks(save_beside_a_step, 1, str(tmp_path), waits) == [(waits, True)]
