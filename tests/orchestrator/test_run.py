"""The whole line on a tiny model, through the command line as a user runs it: once, again, killed, four ways."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.bucket import KEY_ID, SECRET, serve_bucket
from tests.ray_head import answers, free_ports
from tests.tiny import film_rows, load_written, make_bert, tiny_job
from trainers.checkpoint.reading import committed_steps
from trainers.job.load import load_job
from trainers.model.source import find_model
from trainers.run.events import StageStartEvent, read_events
from trainers.run.folder import run_folder
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
MARK = "TUNEYARD_TEST_PROCESS"
"""An environment variable that marks every process a command starts."""


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | extra


def call(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(**extra), capture_output=True, text=True, timeout=400, check=False)


def tuneyard(*words: str) -> subprocess.CompletedProcess[str]:
    return call(sys.executable, "-m", "orchestrator", *words)


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    job = tiny_job(
        folder,
        make_bert(folder / "model", tiny_tokenizer, dropout=0.0),
        "classify",
        [row for row in film_rows(240) if "not" not in row["text"]],
        train={"steps": 24, "global_batch_size": 16, "learning_rate": 3e-3},
        scale={"workers": 2},
        checkpoint={"every_steps": 6, "keep": 3},
    )
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(job_file: Path) -> Path:
    """The run folder of one undisturbed `tuneyard run`."""
    done = tuneyard("run", str(job_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report" in done.stdout
    return find_run(job_file, "tiny")


def find_run(job_file: Path, name: str) -> Path:
    (run,) = (job_file.parent / "storage" / "runs").glob(f"{name}-????????")
    return run


def losses(run: Path) -> dict[int, float]:
    return {event.step: event.loss for event in read_events(Folder(str(run))) if event.kind == "step"}


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


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
    (start,) = [event for event in read_events(Folder(str(finished))) if event.kind == "start"]
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


def test_the_same_command_again_does_nothing_twice(finished: Path, job_file: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (job_file.parent / "storage").rglob("*") if path.is_file()}
    began = time.monotonic()
    again = tuneyard("run", str(job_file))
    assert again.returncode == 0
    assert "already done" in again.stdout
    assert time.monotonic() - began < 15
    after = {path: path.stat().st_mtime_ns for path in (job_file.parent / "storage").rglob("*") if path.is_file()}
    assert after == before


def test_status_and_registry_answer_in_json(finished: Path, job_file: Path) -> None:
    storage = str(job_file.parent / "storage")
    (status,) = json.loads(tuneyard("status", "tiny", "--storage", storage, "--json").stdout)
    assert (status["state"], status["step"]) == ("done", 24)
    (model,) = json.loads(tuneyard("registry", "list", "--storage", storage, "--json").stdout)
    assert model["model"] == "tiny"
    (version,) = json.loads(tuneyard("registry", "show", "tiny", "--storage", storage, "--json").stdout)
    assert version["champion"] is True
    assert version["lineage"]["data.train.rows_in"] == "96"
    ledger = json.loads(tuneyard("ledger", str(finished), "--json").stdout)
    assert [(split["split"], split["rows_in"]) for split in ledger["splits"]] == [("train", 96), ("eval", 24)]


def test_evaluating_again_gives_the_same_metrics(finished: Path, job_file: Path) -> None:
    best = result_of(finished)["best"]
    again = tuneyard("evaluate", str(job_file), "--step", str(best["step"]), "--json")
    (record,) = json.loads(again.stdout[again.stdout.index("[\n") :])
    assert record["metrics"] == best["metrics"]
    folder = result_of(finished)["registry"]["source"]
    (record,) = json.loads(tuneyard("evaluate", str(job_file), "--model", folder, "--json").stdout)
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
        with urllib.request.urlopen(f"{tensorboard}/{path}", timeout=10) as reply:
            return json.load(reply)

    deadline = time.monotonic() + 120
    while not (tags := read("tags")):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    while "eval" not in (tags := read("tags")):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    wanted = "train/loss train/learning_rate train/grad_norm speed/tokens_per_s speed/step_s speed/data_wait_s"
    assert {*wanted.split(), "memory/peak_gib"} <= set(tags["."])
    assert {"eval/accuracy", "eval/loss"} <= set(tags["eval"])

    def curve(run: str, tag: str) -> dict[int, float]:
        query = urllib.parse.urlencode({"run": run, "tag": tag})
        return {step: value for _, step, value in read(f"scalars?{query}")}

    assert curve(".", "train/loss") == pytest.approx(losses(finished), rel=1e-6)
    evaluated = {one["step"]: one["metrics"]["accuracy"] for one in result_of(finished)["evaluations"]}
    assert curve("eval", "eval/accuracy") == pytest.approx(evaluated, rel=1e-6)


def test_tensorboard_holds_a_confusion_matrix_of_every_evaluation(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    held = EventAccumulator(str(finished / "tensorboard" / "eval"), {IMAGES: 0}).Reload()
    pictures = {event.step: event for event in held.Images("eval/confusion")}
    assert set(pictures) == {one["step"] for one in result_of(finished)["evaluations"]}
    for event in pictures.values():
        assert event.encoded_image_string.startswith(b"\x89PNG") and min(event.width, event.height) > 100


def test_adapters_are_registered_merged_and_scored_alike_by_any_number_of_workers(job_file: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    sets = {"name": "adapted", "model.lora": "{rank: 4}", "train.steps": "6", "evaluate.batch_size": "4"}
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    done = tuneyard("run", str(job_file), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    storage = str(job_file.parent / "storage")
    (version,) = json.loads(tuneyard("registry", "show", "adapted", "--storage", storage, "--json").stdout)
    registered = load_file(Path(version["source"]) / "model.safetensors")
    before = load_file(job_file.parent / "model" / "model.safetensors")
    assert not [name for name in registered if "lora" in name]
    inner = [
        name for name in registered if "attention" in name and name.endswith("weight") and registered[name].dim() == 2
    ]
    assert inner and all(not registered[name].equal(before[name.removeprefix("bert.")]) for name in inner)
    AutoModelForSequenceClassification.from_pretrained(version["source"])

    alone = {one["step"]: one["metrics"] for one in result_of(find_run(job_file, "adapted"))["evaluations"]}
    done = tuneyard("evaluate", str(job_file), *words, "--set", "evaluate.workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    evals = find_run(job_file, "adapted") / "evals"
    shared = {step: json.loads((evals / f"step-{step:08d}.json").read_text()) for step in alone}
    assert {step: one["metrics"] for step, one in shared.items()} == alone
    assert min(one["seconds"] for one in shared.values()) > 0


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_without_ray_give_the_same_losses(finished: Path, job_file: Path, launcher: str) -> None:
    configuration = Path(__file__).parents[2] / "ds_configs" / "accelerate-2proc.yaml"
    (port,) = free_ports(1)
    start = {
        "torchrun": ["torchrun", "--nproc-per-node=2", f"--master-port={port}"],
        "accelerate": ["accelerate", "launch", f"--config_file={configuration}", f"--main_process_port={port}"],
    }[launcher]
    done = call(*start, "-m", "trainers", str(job_file), "--set", f"name={launcher}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(find_run(job_file, launcher)) == losses(finished)


def test_ray_job_submit_by_hand_gives_the_same_losses(finished: Path, job_file: Path, head: str) -> None:
    program = f"{Path(sys.executable).parent}/tuneyard"
    done = call(
        "ray", "job", "submit", "--address", head, "--", program, "run", str(job_file), "--set", "name=byhand",
        RAY_AUTH_MODE="disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(find_run(job_file, "byhand")) == losses(finished)


def test_a_submitted_job_whose_driver_is_killed_goes_on_when_submitted_again(
    finished: Path, job_file: Path, head: str
) -> None:
    words = [sys.executable, "-m", "orchestrator", "submit", str(job_file), "--address", head,
             "--set", "name=again"]  # fmt: skip
    first = subprocess.Popen(words, env=environment(RAY_AUTH_MODE="disabled"), stdout=subprocess.PIPE)
    runs, deadline = job_file.parent / "storage" / "runs", time.monotonic() + 400
    while not any(runs.glob("again-????????/checkpoints/step-*/COMMITTED")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    command = ["-m", "orchestrator", "run", "job.yaml"]
    (driver,) = [one for one in psutil.Process().children(recursive=True) if command_line(one)[1:] == command]
    driver.kill()
    first.communicate(timeout=400)
    assert first.returncode not in (0, 2)
    done = call(*words, RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered again version 1" in done.stdout
    run = find_run(job_file, "again")
    assert losses(run) == losses(finished)
    starts = [event.step for event in read_events(Folder(str(run))) if event.kind == "start"]
    assert starts[0] == 0 and starts[-1] in (6, 12, 18, 24)
    storage = str(job_file.parent / "storage")
    versions = json.loads(tuneyard("registry", "show", "again", "--storage", storage, "--json").stdout)
    assert [version["version"] for version in versions] == [1]


def test_checkpoints_may_lie_in_a_bucket_while_the_run_does_not(finished: Path, job_file: Path) -> None:
    """Killed in the middle of the training, too; a whole run in a bucket is refused before anything starts.

    The data is read from there as well, and the keys that stand in both URIs are in no file, log or terminal.
    """
    with serve_bucket() as bucket:
        bucket.client.upload_file(str(job_file.parent / "train.jsonl"), "yard", "data/train.jsonl")
        sets = ["--set", "name=remote", "--set", f"checkpoint.storage={bucket.uri('kept')}"]
        sets += ["--set", f'data.train=["{bucket.uri("data/train.jsonl")}"]']
        runs = job_file.parent / "storage" / "runs"
        driver = subprocess.Popen([sys.executable, "-m", "orchestrator", "run", str(job_file), *sets],
                                  env=environment(), stdout=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 400
        while not any(len(losses(run)) >= 8 for run in runs.glob("remote-????????")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        driver.kill()
        driver.wait()
        done = tuneyard("run", str(job_file), *sets)
        assert done.returncode == 0, done.stdout + done.stderr
        run = find_run(job_file, "remote")
        assert losses(run) == losses(finished)
        kept = committed_steps(bucket.folder("kept") / "runs" / run.name / "checkpoints")
        assert kept[-3:] == [12, 18, 24] and not (run / "checkpoints").exists()
        assert result_of(run)["evaluations"][-1]["metrics"] == result_of(finished)["evaluations"][-1]["metrics"]
        refused = tuneyard("run", str(job_file), "--set", f"storage={bucket.uri('all')}")
        assert refused.returncode == 2
        assert "checkpoint.storage" in refused.stderr
        planned = tuneyard("plan", str(job_file), *sets, "--json")
        objects = bucket.client.list_objects_v2(Bucket="yard", Prefix="kept")["Contents"]
        texts = [(told.stdout + told.stderr).encode() for told in (done, refused, planned)]
        texts += [bucket.client.get_object(Bucket="yard", Key=found["Key"])["Body"].read() for found in objects]
        files = [*(job_file.parent / "storage").rglob("*"), *Path("/tmp/ray/session_latest/logs").rglob("*")]
        texts += [path.read_bytes() for path in files if path.is_file()]
        assert len(texts) > 50
        assert not [text[:80] for text in texts if SECRET.encode() in text or KEY_ID.encode() in text]


def test_a_job_too_large_for_the_machine_is_refused_before_sharding(finished: Path, job_file: Path) -> None:
    known = sorted((finished.parents[1] / "shards").iterdir())
    sets = ("name=toolarge", "scale.cpus_per_worker=64", "data.max_length=9")
    done = tuneyard("run", str(job_file), *(word for one in sets for word in ("--set", one)))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "2 workers of 64 CPUs and 0 GPUs need 128 CPUs" in done.stderr
    assert sorted((finished.parents[1] / "shards").iterdir()) == known


def test_stopped_by_sigterm_then_evaluated_beside_training_and_stopped_early(job_file: Path) -> None:
    """One worker on two cores leaves one to evaluate with; a metric that never improves ends the run early."""
    sets = {
        "name": "stopped", "scale.workers": "1", "train.steps": "4000", "train.learning_rate": "1e-12",
        "checkpoint.every_steps": "50", "checkpoint.keep": "1", "evaluate.early_stopping": "{patience: 2}",
    }  # fmt: skip
    words = ["run", str(job_file), *(word for name, value in sets.items() for word in ("--set", f"{name}={value}"))]
    driver = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    runs = job_file.parent / "storage" / "runs"
    deadline = time.monotonic() + 400
    while not any(len(losses(run)) >= 5 for run in runs.glob("stopped-????????")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=400)
    assert driver.returncode == 75, errors.decode()
    run = find_run(job_file, "stopped")
    assert result_of(run)["status"] == "preempted"
    stopped_at = max(losses(run))
    assert (run / "checkpoints" / f"step-{stopped_at:08d}" / "COMMITTED").exists()

    done = tuneyard(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(Folder(str(run)))
    assert [event.step for event in events if event.kind == "start"] == [0, stopped_at]
    assert [event.stopped for event in events if event.kind == "done"] == ["preempted", "early_stopping"]
    kinds = [event.kind for event in events]
    assert kinds.index("evaluation") < len(kinds) - 1 - kinds[::-1].index("done")
    result = result_of(run)
    assert result["steps"] < 4000
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert f"step-{result['best']['step']:08d}" in left
    assert len(left) <= 3


def test_a_killed_worker_is_restarted_from_the_newest_checkpoint(finished: Path, job_file: Path) -> None:
    """Losses of the steps before and after the kill are those of an undisturbed run."""
    run = coming_run(job_file, "name=wounded")
    run.mkdir(parents=True)
    faults = [{"kind": "slow", "rank": 0, "step": 0, "seconds": 0.05, "always": True},
              {"kind": "kill", "rank": 1, "step": 11}]  # fmt: skip
    (run / "faults.json").write_text(json.dumps(faults))
    done = tuneyard("run", str(job_file), "--set", "name=wounded")
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(Folder(str(run)))
    assert [event.step for event in events if event.kind == "start"] == [0, 6]
    (restart,) = [event for event in events if event.kind == "restart"]
    assert "rank 1" in restart.cause
    assert "was killed by SIGKILL" in restart.cause
    assert f"training failed: {restart.cause}" in done.stdout, "the terminal tells what was healed"
    assert "training on 2 workers, resumed after step 6" in done.stdout
    assert result_of(run)["restarts"] == 1
    assert losses(run) == losses(finished)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def coming_run(job_file: Path, *overrides: str) -> Path:
    """The run folder that a command on shards that are there will use."""
    job = load_job(job_file, list(overrides))
    model = find_model(job)
    assert model is not None
    shards = load_written(job)
    assert shards is not None
    return run_folder(job, model.digest, shards).path


def marked_processes(mark: str) -> list[int]:
    """Living processes whose environment carries the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def name_of(process: int) -> str:
    """What ps shows as the command's name."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return "gone"


def command_of(process: int) -> str:
    try:
        return f"{process}: " + Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return f"{process}: gone"


def run_until(job_file: Path, reached: Callable[[], bool]) -> str:
    """Start `tuneyard run`, kill -9 its driver as soon as `reached`, and wait until all it started is gone, but for the
    guard, which watches for stragglers some seconds more. Returns the mark of its processes."""
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "orchestrator", "run", str(job_file), "--set", "name=killed"]
    with (job_file.parent / "killed.log").open("ab") as log:
        driver = subprocess.Popen(words, env=environment(**{MARK: mark}), stdout=log, stderr=log)
    deadline = time.monotonic() + 400
    while not reached():
        assert driver.poll() is None, (job_file.parent / "killed.log").read_text()
        assert time.monotonic() < deadline, "the stage was not reached"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until_gone(lambda: [process for process in marked_processes(mark) if "reaper.py" not in command_of(process)])
    return mark


def wait_until_gone(living: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + 120
    while left := living():
        assert time.monotonic() < deadline, f"orphans: {[command_of(process) for process in left]}"
        time.sleep(0.2)


def test_a_driver_killed_in_each_stage_is_finished_by_the_same_command(finished: Path, job_file: Path) -> None:
    """Killed while sharding, training, evaluating and registering; ends with the losses of the undisturbed run."""
    storage = job_file.parent / "storage"
    job_file = job_file.with_name("killed.yaml")  # its own data, so that its shards are not there yet
    raw = yaml.safe_load(job_file.with_name("job.yaml").read_text())
    again = job_file.with_name("train-again.jsonl")
    again.write_text(job_file.with_name("train.jsonl").read_text() + "\n", encoding="utf-8")
    raw["data"]["train"] = [str(again)]
    job_file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    known = {path.name for path in (storage / "shards").iterdir()}

    def runs() -> list[Path]:
        return list((storage / "runs").glob("killed-????????"))

    def new_shards() -> bool:
        return any(path.name not in known for path in (storage / "shards").iterdir())

    def trained() -> bool:
        return bool(runs()) and len(losses(runs()[0])) >= 8

    def evaluated() -> bool:
        return bool(runs()) and any((runs()[0] / "evals").glob("*.json"))

    def registering() -> bool:
        last = read_events(Folder(str(runs()[0])))[-1:] if runs() else []
        return any(isinstance(event, StageStartEvent) and event.stage == "register" for event in last)

    marks = [run_until(job_file, stage) for stage in (new_shards, trained, evaluated, registering)]
    done = tuneyard("run", str(job_file), "--set", "name=killed")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs()
    assert losses(run) == losses(finished)
    result = result_of(run)
    assert result["status"] == "done"
    assert result["restarts"] >= 1
    versions = json.loads(tuneyard("registry", "show", "killed", "--storage", str(storage), "--json").stdout)
    assert [version["version"] for version in versions] == [1]
    starts = [event.step for event in read_events(Folder(str(run))) if event.kind == "start"]
    assert starts[0] == 0
    assert starts[-1] in (6, 12, 18, 24)
    wait_until_gone(lambda: [process for mark in marks for process in marked_processes(mark)])
