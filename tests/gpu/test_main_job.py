"""The whole main job on a GPU, through the command line: killed, run again, early stop, registered, reloaded."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gpu import MARKS
from tests.tiny import chat_rows, film_rows, make_bert, make_llama, tiny_job
from tests.trainers.training.test_training import with_
from tests.whole_run import environment, find_run, losses, result_of, tuneyard
from trainers.run.events import read_events
from trainers.storage import Folder

pytestmark = MARKS


def write_job(folder: Path, task: str, tokenizer: Path) -> Path:
    """A job of many steps whose metric soon stands still, so that it stops early."""
    rows = film_rows(240) if task == "classify" else chat_rows(300)
    if task == "classify":
        model = make_bert(folder / "model", tokenizer, dropout=0.0)
    else:
        model = make_llama(folder / "model", tokenizer, hidden_size=96, num_attention_heads=3)
    job = tiny_job(
        folder, model, task, rows,
        data={"max_length": 64 if task == "classify" else 256},
        train={"steps": 100_000, "global_batch_size": 16, "learning_rate": 3e-3, "schedule": "constant"},
        checkpoint={"every_steps": 50, "keep": 2},
        evaluate={"metric": "accuracy" if task == "classify" else "token_accuracy", "early_stopping": {"patience": 3}},
    )  # fmt: skip
    job = with_(job, model={"dtype": "bfloat16"})
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", ["classify", "sft"])
def test_killed_run_again_stopped_early_registered_and_reloaded(
    task: str, tmp_path: Path, tiny_tokenizer: Path, tiny_chat_tokenizer: Path
) -> None:
    path = write_job(tmp_path, task, tiny_tokenizer if task == "classify" else tiny_chat_tokenizer)
    killed_at = kill_driver_in_training(path)
    done = tuneyard("run", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_run(path, "tiny")
    events = read_events(Folder(str(run)))
    starts = [event.step for event in events if event.kind == "start"]
    assert starts[0] == 0
    assert starts[-1] >= killed_at - 50, "it went on from the newest checkpoint"
    assert [event.stopped for event in events if event.kind == "done"] == ["early_stopping"]
    result = result_of(run)
    assert result["status"] == "done"
    assert result["registry"]["alias"] == "champion"
    reload_plainly(task, result["registry"]["source"])
    print(done.stdout)


def kill_driver_in_training(path: Path) -> int:
    """Start the job, kill its driver after 60 steps. Returns the step of the kill."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(path)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    runs = path.parent / "storage" / "runs"
    deadline = time.monotonic() + 400
    while not any(len(losses(run)) >= 60 for run in runs.glob("tiny-????????")):
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(driver.communicate()[0].decode())
        time.sleep(0.05)
    driver.kill()
    driver.communicate(timeout=60)
    return max(losses(find_run(path, "tiny")))


def reload_plainly(task: str, source: str) -> None:
    """Plain transformers finds every key, and answers."""
    import transformers

    kind: Any = getattr(transformers, f"AutoModelFor{'SequenceClassification' if task == 'classify' else 'CausalLM'}")
    model, info = kind.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert model(**tokenizer(["the film is good"], return_tensors="pt")).logits.isfinite().all()
    assert json.loads((Path(source) / "config.json").read_text())["model_type"] in ("bert", "llama")
