"""The end of the loop: nothing is done that is not committed, and nothing of it stays behind."""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from trainers.checkpoint.records import Progress
from trainers.training import loop
from trainers.training.straggler import INTERVAL_S, LONGEST_S, ComputeSampler


class Saver:
    """Takes a save, and commits it or not."""

    reading = False

    def __init__(self, commits: bool) -> None:
        self.commits, self.committed, self._step = commits, None, 0

    def save(self, progress: Progress) -> None:
        self._step = progress.step

    def before_update(self) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None:
        self.committed = self._step if self.commits else None


def run_loop(
    monkeypatch: pytest.MonkeyPatch,
    saver: Saver,
    rank: int = 0,
    ready: Any = lambda *_: None,
    until: int | None = None,
) -> Any:
    """A loop whose two steps are both left out, so that it needs no engine."""
    monkeypatch.setattr(loop, "agree_to_stop", lambda *_: None)
    world: Any = SimpleNamespace(rank=rank, size=1)
    hooks: Any = SimpleNamespace(at=lambda *_: None, stop_reason=lambda: None, emit=lambda *_: None)
    settings = loop.LoopSettings(2, 10, 0, None, frozenset({0, 1}), until)
    nothing: Any = None
    source: Any = SimpleNamespace(ready=ready)
    start = Progress(0, 0)
    return loop.train(nothing, nothing, source, nothing, settings, start, world, hooks, saver, lambda step: None)


def test_a_run_whose_last_step_is_not_committed_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_loop(monkeypatch, Saver(commits=True)).progress.step == 2
    with pytest.raises(OSError, match="step 2, the last, was not committed"):
        run_loop(monkeypatch, Saver(commits=False))
    run_loop(monkeypatch, Saver(commits=False), rank=1)  # rank 0 alone knows


def test_a_loop_that_fails_leaves_no_sampler_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no data")

    def samplers() -> int:
        return sum(thread.name == "busy-meter" for thread in threading.enumerate())

    before = samplers()
    with pytest.raises(RuntimeError, match="no data"):
        run_loop(monkeypatch, Saver(commits=True), ready=fail)
    assert samplers() == before


def test_a_closed_sampler_keeps_nothing_alive() -> None:
    """What it last looked at holds the loop's frame, and with it the engine."""

    class Engine:
        pass

    def step() -> Callable[[], Engine | None]:
        engine = Engine()
        with closing(ComputeSampler()) as sampler:
            while not sampler._looks:
                time.sleep(INTERVAL_S)
        return weakref.ref(engine)

    assert step()() is None


def test_a_pause_ends_the_loop_at_its_step_committed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(commits=True)
    outcome = run_loop(monkeypatch, saver, until=1)
    assert (outcome.progress.step, outcome.stopped, saver.committed) == (1, "paused", 1)
    for until in (2, 5, None):
        outcome = run_loop(monkeypatch, Saver(commits=True), until=until)
        assert (outcome.progress.step, outcome.stopped) == (2, None)


def test_a_sampler_looks_less_often_where_steps_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes of a step must not grow with the step."""
    with closing(ComputeSampler()) as sampler:
        now = time.perf_counter()
        for step_s, interval_s in ((0.1, INTERVAL_S), (10.0, 0.2), (3600.0, LONGEST_S)):
            now += step_s
            monkeypatch.setattr(time, "perf_counter", partial(float, now))
            sampler.share()
            assert sampler._interval_s == pytest.approx(interval_s, rel=0.01)
