"""Runs side by side: only what differs between the jobs, and a difference with the interval that pairs the rows."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.registry.comparison import job_differences
from orchestrator.registry.lineage import resolved_yaml
from tests.orchestrator.registry.test_promotion import predictions
from tests.orchestrator.registry.test_registry import NO, YES, enter, job_of
from trainers.errors import JobError
from trainers.run.folder import Evaluation
from trainers.run.row_scores import write_row_scores
from trainers.storage import Folder
from trainers.tasks import load_task


def train_of(**change):
    return {"global_batch_size": 32, "epochs": 2, "learning_rate": 1.0e-4, "seed": 11} | change


def run_of(storage, name, accuracy, seed, key="e1", rows=400, **change):
    run, numbers = storage / "runs" / name, predictions(accuracy, seed, rows)
    job = job_of(storage, **change)
    metrics = load_task("classify").metrics(numbers)
    evaluation = Evaluation(step=10, status="done", metrics=metrics, eval_key=key, rows=rows)
    run.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    run.write_json("evals/step-00000010.json", evaluation.model_dump(mode="json"))
    write_row_scores(run, 10, numbers["row"], {name: value for name, value in numbers.items() if name != "row"})
    return run


@pytest.fixture
def runs(tmp_path):
    """One run, one that is clearly better at another rate, and one on other data."""
    storage = Folder(str(tmp_path))
    return [
        run_of(storage, "topics-aaaaaaaa", 0.6, 1),
        run_of(storage, "topics-bbbbbbbb", 0.9, 2, train=train_of(learning_rate=3e-4)),
        run_of(storage, "topics-cccccccc", 0.61, 3, key="e2"),
    ]


def call(*words):
    done = CliRunner().invoke(app, ["compare", *map(str, words)])
    if isinstance(done.exception, JobError):
        raise done.exception
    return done.stdout


def test_jobs_differ_in_one_field_and_metrics_beyond_luck(runs):
    told = json.loads(call(*runs, "--json"))
    assert told["jobs"] == {"train.learning_rate": [1e-4, 3e-4, 1e-4]}
    first = told["metrics"][0]
    assert first["metric"] == "accuracy"  # the deciding one
    better, elsewhere = first["differences"]
    assert better["value"] == pytest.approx(first["values"][1] - first["values"][0])
    assert 0 < better["low"] < better["value"] < better["high"]
    assert elsewhere["low"] is None
    assert all(line["differences"][0]["low"] is not None for line in told["metrics"])
    assert told["notes"] == ["topics-cccccccc was evaluated on other data than topics-aaaaaaaa: no interval"]
    shown = call(*runs[:2])
    assert (
        "train.learning_rate" in shown
        and " *" in shown
        and "seed" not in shown
        and "* which leaves out zero" in " ".join(shown.split())
    )


def test_the_same_run_twice_differs_in_nothing(runs):
    told = json.loads(call(runs[0], runs[0], "--json"))
    assert told["jobs"] == {}
    assert told["metrics"][0]["differences"] == [{"value": 0.0, "low": 0.0, "high": 0.0}]
    assert all(line["differences"][0]["value"] == 0.0 for line in told["metrics"])


def test_a_run_without_rows_or_evaluations_is_named(runs):
    (runs[1].path / "evals" / "step-00000010.arrow").unlink()
    told = json.loads(call(*runs[:2], "--json"))
    assert told["notes"][0].startswith("the evaluation rows of topics-bbbbbbbb are gone")
    (runs[1].path / "evals" / "step-00000010.json").unlink()
    with pytest.raises(JobError, match="none was evaluated"):
        call(*runs[:2])
    with pytest.raises(JobError, match="two runs or more"):
        call(runs[0])


def test_nested_fields_are_told_apart(tmp_path):
    jobs = [job_of(Folder(str(tmp_path)), evaluate={"early_stopping": each}) for each in ({"patience": 3}, None)]
    names = job_differences(jobs)
    assert names["evaluate.early_stopping.patience"] == [3, None]
    assert np.all(["storage" not in name for name in names])


def test_versions_are_compared_as_runs_are(storage):
    lineage = {"job": resolved_yaml(job_of(storage))}
    for step, decision in ((10, YES), (20, NO)):
        enter(storage, decision, step=step, lineage=lineage)
    for step in (10, 20):
        rows = np.arange(8)
        numbers = {"label": rows % 4, "prediction": rows % 4, "loss_sum": rows / 8}
        write_row_scores(storage / "runs" / "topics-0badcafe", step, rows, numbers)
    done = CliRunner().invoke(
        app, ["registry", "compare", "topics", "champion", "2", "--storage", str(storage), "--json"]
    )
    told = json.loads(done.stdout)
    assert told["names"] == ["version 1", "version 2"] and told["jobs"] == {}
    assert [line["metric"] for line in told["metrics"]] == ["accuracy", "loss"]
