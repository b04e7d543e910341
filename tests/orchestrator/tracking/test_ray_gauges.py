"""A run's figures on the port that every Ray node offers to Prometheus: asked there, on a real head."""

import re
from pathlib import Path

import pytest

from orchestrator.submitting.submit import connect, follow, send
from orchestrator.tracking.ray_gauges import GAUGES
from tests.orchestrator.submitting.test_submit import job_of

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, time, urllib.request
import ray
from orchestrator.tracking.ray_gauges import GAUGES, RayGauges
from trainers.run.events import CheckpointEvent, EvaluationEvent, RestartEvent, StartEvent, StepEvent
ray.init(address="auto", log_to_driver=False)
gauges = RayGauges("topics-1234")
gauges.on_event(StartEvent(step=0, steps=50, world_size=2))
gauges.on_event(StepEvent(step=7, loss=1.25, learning_rate=0.5, tokens_per_s=900.0))
gauges.on_event(CheckpointEvent(step=6))
gauges.on_event(RestartEvent(step=6, cause="a rank was killed"))
gauges.on_event(EvaluationEvent(step=6, status="done", metrics={"accuracy": 0.75, "f1/good": 0.5}))
url = "http://{}:{}/metrics".format(ray.nodes()[0]["NodeManagerAddress"], ray.nodes()[0]["MetricsExportPort"])
for _ in range(120):
    lines = [line for line in urllib.request.urlopen(url).read().decode().splitlines() if "ray_tuneyard_" in line]
    if all(any(name in line for line in lines) for name in GAUGES):
        break
    time.sleep(1)
print(*lines, sep=chr(10))
"""


@pytest.mark.cluster
def test_every_gauge_is_offered_with_its_run_and_value(
    head: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    client, program = connect(head), tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert follow(client, send(client, job_of(), str(program))) == 0
    said = capsys.readouterr().out
    values = {
        (name, metric): float(value)
        for name, tags, value in re.findall(r"^ray_(tuneyard_\w+)\{(.*)\} (\S+)$", said, re.MULTILINE)
        if 'run="topics-1234"' in tags
        for metric in re.findall(r'metric="(.*?)"', tags) or [""]
    }
    assert values == {
        ("tuneyard_step", ""): 7.0,
        ("tuneyard_steps", ""): 50.0,
        ("tuneyard_workers", ""): 2.0,
        ("tuneyard_loss", ""): 1.25,
        ("tuneyard_learning_rate", ""): 0.5,
        ("tuneyard_tokens_per_second", ""): 900.0,
        ("tuneyard_checkpoint_step", ""): 6.0,
        ("tuneyard_restarts", ""): 1.0,
        ("tuneyard_evaluation", "accuracy"): 0.75,
    }


def test_the_page_for_operators_lists_every_gauge() -> None:
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `ray_(tuneyard_\w+)`", page, re.MULTILINE)) == set(GAUGES)
