"""TensorBoard through its own server: every evaluation, in step order, whatever order they ended in."""

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.orchestrator.training.test_placement import job_of
from trainers.run.events import EvaluationEvent, StartEvent, StepEvent
from trainers.run.folder import Evaluation
from trainers.run.log import RunLog
from trainers.storage import Folder

pytestmark = pytest.mark.slow
Read = Callable[..., Any]


def steps(log: RunLog, first: int, last: int) -> None:
    log.append(StartEvent(step=first, steps=60, world_size=1))
    for step in range(first + 1, last + 1):
        log.append(StepEvent(step=step, loss=1 / step, learning_rate=0.1))


def evaluation(step: int) -> EvaluationEvent:
    return EvaluationEvent(step=step, metrics={"f1_macro": step / 100, "f1/ai": step / 200, "loss": 1.0})


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """Asks a real server over two runs: evaluations newest first, and a run that was killed twice."""
    root, job = tmp_path_factory.mktemp("runs"), job_of(1)
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"metric": "f1_macro"})})
    log = RunLog(Folder(str(root / "reversed")), job=job)
    steps(log, 0, 60)
    for step in (60, 50, 40, 30, 20, 10):
        log.append(evaluation(step))
    log.close()
    killed = Folder(str(root / "killed"))
    log = RunLog(killed, job=job)
    steps(log, 0, 30)
    log.append(evaluation(20))
    del log  # the driver is killed; step 10 is evaluated while nobody listens
    record = Evaluation(step=10, status="done", metrics=evaluation(10).metrics, eval_key="e")
    (killed / "evals").write_bytes("step-00000010.json", record.model_dump_json().encode())
    time.sleep(1.1)  # event files are ordered by the second in their name
    log = RunLog(killed, job=job)
    steps(log, 20, 40)
    for step in (40, 30):
        log.append(evaluation(step))
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(root), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    try:
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))

        def ask(path: str, **query: str) -> Any:
            url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)

        deadline = time.monotonic() + 400
        while len(ask("scalars/tags")) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield ask
    finally:
        server.kill()
        server.wait()


def curve(read: Read, run: str, tag: str, last: int) -> list[tuple[int, float]]:
    """What is shown once everything up to the last step is loaded, which takes the server some seconds."""
    deadline = time.monotonic() + 400
    while True:
        shown = [(step, round(value, 6)) for _, step, value in read("scalars/scalars", run=run, tag=tag)]
        if (shown and shown[-1][0] == last) or time.monotonic() > deadline:
            return shown
        time.sleep(0.5)


def test_evaluations_that_ended_newest_first_are_all_shown_in_step_order(read: Read) -> None:
    expected = [(step, step / 100) for step in range(10, 70, 10)]
    assert curve(read, "reversed/tensorboard/eval", "eval/f1_macro", 60) == expected
    assert len(curve(read, "reversed/tensorboard", "train/loss", 60)) == 60


def test_a_run_that_was_killed_and_resumed_shows_what_ended_meanwhile(read: Read) -> None:
    assert [step for step, _ in curve(read, "killed/tensorboard/eval", "eval/f1_macro", 40)] == [10, 20, 30, 40]
    assert [step for step, _ in curve(read, "killed/tensorboard", "train/loss", 40)] == list(range(1, 41))


def test_figures_of_classes_stand_apart_and_the_first_page_and_hyperparameters_are_there(read: Read) -> None:
    tags = read("scalars/tags")["reversed/tensorboard/eval"]
    assert "per_class/f1/ai" in tags and "eval/f1/ai" not in tags
    layout = read("custom_scalars/layout")
    charts = [chart["title"] for category in layout["category"] for chart in category["chart"]]
    assert any("decides" in title for title in charts)
    experiment = read("hparams/experiment", request=json.dumps({"experimentName": ""}))
    names = {known["name"] for known in experiment["hparamInfos"]}
    assert "train.learning_rate" in names and "data.decontaminate" not in names
    assert [known["name"]["tag"] for known in experiment["metricInfos"]] == ["eval/f1_macro"]
