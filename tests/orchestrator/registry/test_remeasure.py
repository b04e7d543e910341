"""`registry verify --metric`: the same device gives the same bits; a changed weight with patched digests is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.evaluation.task import score
from orchestrator.registry.digests import list_files
from orchestrator.registry.lineage import lineage
from orchestrator.registry.mlflow_client import open_client, registry_uri
from orchestrator.registry.promotion import Promotion
from orchestrator.registry.read import RECORD, champion
from orchestrator.registry.register import register
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.tasks.small import with_head
from trainers.errors import EvaluationError
from trainers.evaluation import device
from trainers.evaluation.evaluate import done_evaluation, keep_scores
from trainers.model.world import pick_device
from trainers.run.record import Run, find_run
from trainers.storage import Folder
from trainers.training.divergence import SkippedSteps


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Path) -> Run:
    """A run whose step 3 is registered with what it measured, over two evaluation sets and with a metric of its own."""
    (tmp_path / "mine.py").write_text("def rows(labels, predictions, texts):\n    return len(texts)\n")
    more = {
        "data": {"eval_sets": {"old": [str(tmp_path / "dev.jsonl")]}},
        "evaluate": {"metrics": {"mine": {"function": f"{tmp_path}/mine.py:rows"}}},
    }
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(60), **more)
    shard_locally(job)
    run = find_run(job)
    export = with_head(run, run.folder.path / "export" / "step-00000003")
    measured = keep_scores(run, run.load_task(), 3, [score(run, str(export), 0)], device.computed_on(pick_device(0)))
    parents = lineage(job, run.shards, run.model.digest, SkippedSteps())
    register(job, run.folder, done_evaluation(3, run.shards.eval.key, measured, 1.0), Folder(str(export)), parents,
             Promotion(promote=True, reason="test"))  # fmt: skip
    run.folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json")).encode())
    return run


def verify(run: Run, *words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["registry", "verify", "tiny", *words, "--storage", run.job.storage, "--json"])
    if done.exception and not isinstance(done.exception, EvaluationError):
        raise done.exception
    told = json.loads(done.stdout) if done.stdout else str(done.exception)
    return getattr(done.exception, "exit_code", 0), told


def patch(run: Run, by: float, **record: Any) -> None:
    """Add to one weight of the head, and write the digests of what is there then into the registry."""
    from safetensors.torch import load_file, save_file

    uri = registry_uri(run.job.storage)
    version = champion(uri, "tiny")
    assert version is not None
    file = Path(version.source) / "model.safetensors"
    weights = load_file(file)
    weights["classifier.weight"][0, 0] += by
    save_file(weights, file, {"format": "pt"})
    files = {name: one.model_dump() for name, one in list_files(Folder(version.source)).items()}
    client = open_client(uri)
    told = json.loads(client.get_model_version("tiny", "1").tags[RECORD])
    client.set_model_version_tag("tiny", "1", RECORD, json.dumps({**told, "files": files, **record}))


def test_the_same_folder_measures_the_same_bits(run: Run) -> None:
    code, told = verify(run, "--metric")
    found = {one["metric"]: one for one in told["metric"]["metrics"]}
    assert code == 0 and told["metric"]["tolerance"] == 0 and told["metric"]["rows"] == 24
    assert found["loss"]["again"] == found["loss"]["recorded"] and found["loss@old"]["state"] == "ok"
    assert found["mine"]["again"] is None and "not run from a registry" in found["mine"]["state"]
    assert {one["state"] for name, one in found.items() if not name.startswith("mine")} == {"ok"}


def test_a_changed_weight_with_patched_digests_is_found_by_the_metric_alone(run: Run) -> None:
    patch(run, 1e-3)
    assert verify(run)[0] == 0
    code, told = verify(run, "--metric")
    assert code == 6
    states = {one["metric"]: one["state"] for one in told["metric"]["metrics"]}
    assert states["loss"].startswith("differs by") and states["accuracy"] == "ok"


def test_on_another_device_a_little_difference_is_within_the_tolerance_and_a_large_one_is_not(run: Run) -> None:
    patch(run, 1e-5, computed_on="NVIDIA H100 80GB HBM3, torch 2.13.0")
    code, told = verify(run, "--metric")
    assert code == 0 and told["metric"]["tolerance"] == 1e-4
    assert "ok, within the tolerance" in {one["state"] for one in told["metric"]["metrics"]}
    patch(run, 1.0, computed_on="")
    code, told = verify(run, "--metric")
    assert code == 6 and told["metric"]["recorded_on"] == "unknown"


def test_rows_that_are_gone_are_named_with_the_remedy(run: Run) -> None:
    (Folder(run.job.storage) / "shards").delete(run.shards.eval.key)
    code, said = verify(run, "--metric")
    assert code == 6 and run.shards.eval.key in said and "`tuneyard shard` with the run's job file" in said
    assert verify(run)[0] == 0
