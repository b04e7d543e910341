"""The whole line on a tiny model, through the command line: what one run leaves, and what is done with it after."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_command
from tests.ray_head import answers, free_ports
from tests.whole_run import answer, events_of, find_run, losses, mlflow_runs, result_of, sets, storage_of, tuneyard

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_the_run_folder_holds_what_is_documented(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    documented = "job.yaml plan.json result.json events.jsonl report.html checkpoints evals export tensorboard logs"
    assert set(documented.split()) <= names
    result = result_of(finished)
    assert result["status"] == "done"
    assert (result["steps"], result["restarts"]) == (24, 0)
    assert set(result["seconds"]) == {"shard", "train", "evaluate", "register"}
    assert 0 < result["goodput"] <= 1
    assert min(result["accounting"].values()) >= 0
    assert sum(result["accounting"].values()) == pytest.approx(sum(result["seconds"].values()), rel=0.01)
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["steps"] == 24
    (start,) = events_of(finished, "start")
    headers = 64 * 1024
    assert 0 < start.checkpoint_bytes - plan["checkpoint_gib"] * 2**30 < headers


def test_every_kept_checkpoint_is_evaluated_and_the_best_is_registered(finished: Path) -> None:
    result = result_of(finished)
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"step-00000012", "step-00000018", "step-00000024"} <= kept
    evaluated = {f"step-{one['step']:08d}": one["metrics"]["accuracy"] for one in result["evaluations"]}
    assert kept <= set(evaluated)
    assert result["best"]["value"] == max(evaluated.values()) > 0.9
    decision = result["registry"].pop("decision")
    assert decision.startswith("promoted: the model has no champion yet, and accuracy")
    assert result["registry"] | {"source": ""} == {
        "model": "tiny",
        "version": 1,
        "alias": "champion",
        "step": result["best"]["step"],
        "source": "",
    }
    assert [path.name for path in (finished / "export").iterdir()] == [f"step-{result['best']['step']:08d}"]


def test_mlflow_followed_the_run_to_its_report(finished: Path, job_file: Path) -> None:
    (run,) = mlflow_runs(storage_of(job_file), "tiny")
    assert (run.info.run_name, run.info.status) == (finished.name, "FINISHED")
    assert run.data.metrics["train/loss"] == losses(finished)[24]
    assert run.data.metrics["registered/accuracy"] == result_of(finished)["best"]["value"]
    pages = {path.name for path in (storage_of(job_file) / "mlartifacts").rglob("*") if path.is_file()}
    assert pages == {"report.html", "confusion.png"}


def test_the_export_opens_with_plain_from_pretrained_and_answers_as_evaluated(finished: Path, job_file: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = result_of(finished)["registry"]["source"]
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [json.loads(line) for line in (job_file.parent / "dev.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)).logits
    said = [model.config.id2label[int(index)] for index in logits.argmax(-1)]
    correct = sum(word == row["label"] for word, row in zip(said, rows, strict=True))
    assert correct / len(rows) == result_of(finished)["best"]["metrics"]["accuracy"]


def test_the_same_command_again_does_nothing_twice(finished: Path, job_file: Path, tmp_path: Path) -> None:
    """Nor does it look for a cluster: none answers at that address."""
    before = {path: path.stat().st_mtime_ns for path in storage_of(job_file).rglob("*") if path.is_file()}
    again = run_command(["run", str(job_file), "--address", "127.0.0.1:1"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already done" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in storage_of(job_file).rglob("*") if path.is_file()}
    assert after == before


def test_status_and_registry_answer_in_json(finished: Path, job_file: Path) -> None:
    storage = ("--storage", str(storage_of(job_file)))
    (status,) = answer("status", "tiny", *storage)
    assert (status["state"], status["step"]) == ("done", 24)
    (model,) = answer("registry", "list", *storage)
    assert model["model"] == "tiny"
    (version,) = answer("registry", "show", "tiny", *storage)
    assert version["champion"] is True
    assert version["lineage"]["data.train.rows_in"] == "96"
    splits = answer("ledger", str(finished))["splits"]
    assert [(split["split"], split["rows_in"]) for split in splits] == [("train", 96), ("eval", 24)]


@pytest.mark.usefixtures("ray_session")
def test_evaluating_again_gives_the_same_metrics(finished: Path, job_file: Path) -> None:
    best = result_of(finished)["best"]
    (record,) = answer("evaluate", str(job_file), "--step", str(best["step"]))
    assert record["metrics"] == best["metrics"]
    folder = result_of(finished)["registry"]["source"]
    record = answer("evaluate", str(job_file), "--model", folder)
    assert (record["model"], record["rows"]) == (folder, 24)
    assert record["metrics"] == pytest.approx(best["metrics"], abs=1e-6)


def test_a_checkpoint_exports_by_hand(finished: Path, tmp_path: Path) -> None:
    done = tuneyard("export", str(finished), "--step", "24", "--out", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()
    refused = tuneyard("export", str(finished), "--step", "5", "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "--step 5 is not committed" in refused.stderr
    assert "24]" in refused.stderr


@pytest.fixture
def tensorboard(finished: Path) -> Iterator[str]:
    """Address of a real TensorBoard over the run folder."""
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished / "tensorboard"), "--port", str(port)]
    server = subprocess.Popen([*words, "--host", "127.0.0.1", "--load_fast=false"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 400
        while not answers(f"http://127.0.0.1:{port}/data/environment"):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/data/plugin/scalars"
    finally:
        server.terminate()
        server.wait()


def test_tensorboard_shows_every_curve_on_one_step_axis(tensorboard: str, finished: Path) -> None:
    def read(path: str) -> Any:
        with urllib.request.urlopen(f"{tensorboard}/{path}", timeout=60) as reply:
            return json.load(reply)

    def curve(run: str, tag: str) -> dict[int, float]:
        if tag not in read("tags").get(run, ()):
            return {}
        query = urllib.parse.urlencode({"run": run, "tag": tag})
        return {step: value for _, step, value in read(f"scalars?{query}")}

    evaluated = {one["step"]: one["metrics"]["accuracy"] for one in result_of(finished)["evaluations"]}
    deadline = time.monotonic() + 200
    for run, tag, expected in ((".", "train/loss", losses(finished)), ("eval", "eval/accuracy", evaluated)):
        while (shown := curve(run, tag)).keys() != expected.keys():  # it shows a file while it reads it
            assert time.monotonic() < deadline, f"{run} {tag}: {shown}"
            time.sleep(0.3)
        assert shown == pytest.approx(expected, rel=1e-6)
    wanted = "train/loss train/learning_rate train/grad_norm speed/tokens_per_s speed/step_s speed/data_wait_s"
    tags = read("tags")
    assert {*wanted.split(), "memory/peak_gib"} <= set(tags["."])
    assert {"eval/accuracy", "eval/loss"} <= set(tags["eval"])


def test_tensorboard_holds_a_confusion_matrix_of_every_evaluation(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    held = EventAccumulator(str(finished / "tensorboard" / "eval"), {IMAGES: 0}).Reload()
    pictures = {event.step: event for event in held.Images("eval/confusion")}
    assert set(pictures) == {one["step"] for one in result_of(finished)["evaluations"]}
    for event in pictures.values():
        assert event.encoded_image_string.startswith(b"\x89PNG") and min(event.width, event.height) > 100


@pytest.mark.usefixtures("ray_session")
def test_adapters_are_registered_merged_and_scored_alike_by_any_number_of_workers(job_file: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    words = sets(name="adapted", model__lora="{rank: 4}", train__steps=6, evaluate__batch_size=4)
    done = tuneyard("run", str(job_file), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (version,) = answer("registry", "show", "adapted", "--storage", str(storage_of(job_file)))
    registered = load_file(Path(version["source"]) / "model.safetensors")
    before = load_file(job_file.parent / "model" / "model.safetensors")
    assert not [name for name in registered if "lora" in name]
    inner = [
        name for name in registered if "attention" in name and name.endswith("weight") and registered[name].dim() == 2
    ]
    assert inner and all(not registered[name].equal(before[name.removeprefix("bert.")]) for name in inner)
    AutoModelForSequenceClassification.from_pretrained(version["source"])

    alone = {one["step"]: one["metrics"] for one in result_of(find_run(job_file, "adapted"))["evaluations"]}
    done = tuneyard("evaluate", str(job_file), *words, *sets(evaluate__workers=2))
    assert done.returncode == 0, done.stdout + done.stderr
    evals = find_run(job_file, "adapted") / "evals"
    shared = {step: json.loads((evals / f"step-{step:08d}.json").read_text()) for step in alone}
    assert {step: one["metrics"] for step, one in shared.items()} == alone
    assert min(one["seconds"] for one in shared.values()) > 0


@pytest.mark.usefixtures("ray_session")
def test_a_job_too_large_for_the_machine_is_refused_before_sharding(finished: Path, job_file: Path) -> None:
    known = sorted((finished.parents[1] / "shards").iterdir())
    words = sets(name="toolarge", scale__cpus_per_worker=64, data__max_length=9)
    done = tuneyard("run", str(job_file), *words)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "2 workers of 64 CPUs and 0 GPUs need 128 CPUs" in done.stderr
    assert sorted((finished.parents[1] / "shards").iterdir()) == known
