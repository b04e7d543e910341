"""What a run says while it goes on: troubles in sentences, time left, the deciding metric first."""

import io
import re

import pytest
from rich.console import Console

from orchestrator.terminal import progress
from orchestrator.terminal.progress import Screen
from trainers.run.events import (
    CheckpointEvent,
    CheckpointQuarantinedEvent,
    CheckpointSkippedEvent,
    EvaluationEvent,
    Event,
    HangEvent,
    RestartEvent,
    RolledBackEvent,
    StartEvent,
    StepEvent,
    StragglerEvent,
)

TROUBLES: list[tuple[Event, str]] = [
    (RestartEvent(cause="rank 1 on n1 was killed by SIGKILL"), "training failed: rank 1 on n1 was killed by SIGKILL"),
    (RestartEvent(cause="x", failures=2), "training failed (failure 2 in a row without a new checkpoint): x"),
    (
        HangEvent(rank=1, step=6, phase="data", line="loader.py:7 in next", report="r"),
        "the ranks hang: rank 1 at step 6, phase data, loader.py:7 in next",
    ),
    (RolledBackEvent(step=7, reason="the loss is nan"), "step 7 diverged: the loss is nan. Going back"),
    (StragglerEvent(step=3, rank=1, lag_s=0.2), "rank 1 is slow: the others wait 0.20 s a step for it"),
    (CheckpointSkippedEvent(step=8, reason="no room"), "checkpoint of step 8 was not kept: no room"),
    (CheckpointQuarantinedEvent(step=8, reason="a digest"), "checkpoint of step 8 is damaged and was set aside: a d"),
]


def screen_of(terminal: bool) -> tuple[Screen, io.StringIO]:
    stream = io.StringIO()
    return Screen(Console(file=stream, force_terminal=terminal, width=200, color_system=None)), stream


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("event", "sentence"), TROUBLES, ids=lambda value: getattr(value, "kind", ""))
def test_every_trouble_is_told_in_a_sentence(event: Event, sentence: str, terminal: bool) -> None:
    screen, stream = screen_of(terminal)
    with screen.live():
        screen.on_event(event, 20)
    assert sentence in stream.getvalue()


def test_a_straggler_is_told_of_once_a_launch() -> None:
    screen, stream = screen_of(terminal=False)
    for step in range(1, 5):
        screen.on_event(StragglerEvent(step=step, rank=1, lag_s=0.2), 20)
    assert stream.getvalue().count("is slow") == 1
    screen.on_event(StartEvent(step=4, steps=20), 20)
    screen.on_event(StragglerEvent(step=5, rank=1, lag_s=0.2), 20)
    assert stream.getvalue().count("is slow") == 2


def test_a_pipe_gets_a_line_a_minute_with_clock_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, stream = screen_of(terminal=False)
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for step in range(1, 101):
        screen.on_event(StepEvent(step=step, loss=1.0, tokens_per_s=5.0), 100)
        clock[0] += 6.0
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert re.match(r"\d\d:\d\d:\d\d train: 11/100, 8 min 54 s left, loss 1.0000, 5 tokens/s", lines[1])
    assert "100/100" in lines[-1] and "left" not in lines[-1]


@pytest.mark.parametrize("steps", [114, 1_000_000])
def test_what_is_waited_for_and_long_runs_leave_the_bars_their_values(steps: int) -> None:
    stream = io.StringIO()
    screen = Screen(Console(file=stream, force_terminal=True, width=80, color_system=None))
    with screen.live():
        screen.advance("train data", 1, 1, "607 rows, 12,678 tokens")
        screen.wait("starting the workers: self-tests and loading")
    shown = stream.getvalue()
    assert "1/1" in shown and "607 rows, 12,678 tokens" in shown and "self-tests and loading" in shown
    with screen.live():
        screen.on_event(StepEvent(step=steps // 2, loss=10.1402, tokens_per_s=144_125.0), steps)
    assert f"{steps // 2}/{steps}" in stream.getvalue() and "loss 10.1402, 144,125 tokens/s" in stream.getvalue()


def test_sentences_are_wrapped_between_words_and_paths_are_left_whole() -> None:
    stream = io.StringIO()
    screen = Screen(Console(file=stream, force_terminal=True, width=80, color_system=None, soft_wrap=True))
    sentence, path = "an evaluation needs a processor " * 4, f"folder  /storage/{'x' * 90}"
    screen.say(sentence.strip())
    screen.say(path)
    *lines, last = stream.getvalue().splitlines()
    assert last == path and len(lines) == 2 and " ".join(lines).split() == sentence.split()


def test_the_deciding_metric_comes_first() -> None:
    screen, stream = screen_of(terminal=False)
    screen.metric = "f1_macro"
    metrics = {"accuracy": 0.9, "auroc": 0.8, "f1/ai": 0.1, "f1_macro": 0.7}
    screen.on_event(EvaluationEvent(step=8, metrics=metrics), 20)
    assert stream.getvalue().startswith("evaluation of step 8: f1_macro 0.7000, accuracy 0.9000")


def test_something_moves_while_the_ranks_load_and_a_commit_breaks_no_bar() -> None:
    screen, stream = screen_of(terminal=True)
    with screen.live():
        screen.wait("starting the workers")
        assert [task.description for task in screen._waiting.tasks] == ["starting the workers"]
        screen.on_event(CheckpointEvent(step=1), 20)
        screen.on_event(StepEvent(step=1, loss=1.0), 20)
        assert [task.description for task in screen._progress.tasks] == ["train"]
    assert "is committed" not in stream.getvalue()
