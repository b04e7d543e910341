"""Bad input through the command line: the right exit code, one clear message, no traceback, nothing harmed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forked import run_command
from tests.tiny import film_rows, make_bert, write_rows


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder with a model and data; tests write job files into it."""
    folder = tmp_path_factory.mktemp("bad")
    make_bert(folder / "model", tiny_tokenizer)
    write_rows(folder / "train.jsonl", film_rows(40))
    write_rows(folder / "dev.jsonl", film_rows(8))
    return folder


def job(**sections: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "bad",
        "task": "classify",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"], "eval": ["dev.jsonl"], "max_length": 32},
        "train": {"global_batch_size": 8, "steps": 2, "learning_rate": 1e-3},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return raw


def call(folder: Path, raw: dict[str, Any], command: str = "plan") -> subprocess.CompletedProcess[str]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return run_command([command, str(path)], folder)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit code, every word in one message, no traceback."""
    said = " ".join(done.stderr.split())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in said  # a warning on the data may stand before it
    for word in words:
        assert word in said


def test_an_unknown_key(good: Path) -> None:
    path = good / "unknown.yaml"
    path.write_text(yaml.safe_dump(job(train={"lerning_rate": 1})), encoding="utf-8")
    words = [sys.executable, "-m", "orchestrator", "plan", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    refused(done, 2, "train.lerning_rate: unknown key; did you mean 'learning_rate'?")


def test_zero_workers(good: Path) -> None:
    refused(call(good, job(scale={"workers": 0})), 2, "scale.workers: must be greater than or equal to 1, got 0")


def test_a_missing_file_names_the_nearest(good: Path) -> None:
    refused(call(good, job(data={"train": ["trian.jsonl"]})), 2, "trian.jsonl", "train.jsonl")


def test_a_model_folder_that_does_not_exist(good: Path) -> None:
    refused(call(good, job(model={"path": "./nothing"})), 2, "model.path: no folder", "nothing")


def test_a_model_with_pickled_weights_only(good: Path) -> None:
    folder = good / "pickled"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(
        call(good, job(model={"path": "pickled"})), 2, "no safetensors", "pytorch_model.bin", "pickles are never loaded"
    )


def test_a_column_that_does_not_exist(good: Path) -> None:
    refused(call(good, job(data={"columns": {"text": "review"}})), 2, "review", "data.columns")


def test_storage_that_cannot_be_written(good: Path) -> None:
    (good / "a-file").write_text("x")
    refused(call(good, job(storage="a-file/runs")), 2, "storage", "cannot be written")


def test_a_deepspeed_file_that_contradicts_the_job(good: Path) -> None:
    (good / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 7}))
    refused(call(good, job(train={"deepspeed": "ds.json"})), 2, "train_batch_size = 7, the job 8")


def test_a_batch_that_does_not_divide(good: Path) -> None:
    refused(call(good, job(scale={"workers": 3})), 2, "(8) must be divisible by the world size (3)", "[1, 2, 4, 8]")


def test_a_metric_the_task_does_not_know(good: Path) -> None:
    refused(call(good, job(evaluate={"metric": "bleu"})), 2, "evaluate.metric: task classify gives accuracy", "'bleu'")


def test_all_of_these_at_once(good: Path) -> None:
    raw = job(
        scale={"workers": 3}, model={"path": "./nothing"}, data={"train": ["no.jsonl"]}, evaluate={"metric": "bleu"}
    )
    refused(call(good, raw), 2, "4 problems", "bleu", "divisible", "no.jsonl", "nothing")


def test_a_wrong_key_hides_nothing_else(good: Path) -> None:
    """Problems of the file itself, of its arithmetic, its metric, its model and its data, in one message."""
    raw = job(
        train={"stpes": 2},
        scale={"workers": 3, "cpus_per_worker": "all"},
        evaluate={"metric": "f1"},
        data={"train": ["no.jsonl"], "max_length": 900},
    )
    said = call(good, raw)
    refused(said, 2, "6 problems", "mean 'steps'", "cpus_per_worker", "divisible", "'f1'", "no.jsonl", "64 positions")
    said = call(good, job(scale={"workers": 0}, data={"train": ["no.jsonl"]}))
    refused(
        said, 2, "2 problems", "no.jsonl", "not checked, for it depends on a wrong value: batch sizes (scale.workers)"
    )


def test_text_with_colons_is_shown_as_it_is(good: Path) -> None:
    refused(call(good, job(scale={"min:x": 1})), 2, "scale.min:x: unknown key")


def test_a_file_that_is_not_what_its_name_says(good: Path) -> None:
    (good / "fake.parquet").write_text('{"text": "x"}\n')
    refused(call(good, job(data={"train": ["fake.parquet"]})), 4, "fake.parquet", "parquet")


@pytest.mark.slow
@pytest.mark.cluster
def test_an_empty_data_set(good: Path) -> None:
    (good / "empty.jsonl").write_text("\n\n")
    refused(call(good, job(data={"train": ["empty.jsonl"]}), "shard"), 4, "data.train: the data set is empty")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_label_unseen_in_training(good: Path) -> None:
    write_rows(good / "strange.jsonl", [*film_rows(4), {"text": "a film", "label": "mixed"}])
    done = call(good, job(data={"eval": ["strange.jsonl"]}), "shard")
    refused(done, 4, "'mixed' (1 rows)", "'negative', 'positive'")


@pytest.mark.slow
@pytest.mark.cluster
def test_rows_dropped_over_budget_are_shown(good: Path) -> None:
    write_rows(good / "holes.jsonl", [*film_rows(30), *({"text": "", "label": "x"} for _ in range(12))])
    done = call(good, job(data={"train": ["holes.jsonl"]}), "shard")
    refused(done, 4, "12 of 42 rows are dropped (28.57%)", "max_drop_fraction", "empty_text")


def test_torchrun_without_shards_names_the_command(good: Path) -> None:
    path = good / "unsharded.yaml"
    path.write_text(yaml.safe_dump(job(data={"max_length": 31})), encoding="utf-8")
    words = [sys.executable, "-m", "trainers", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    refused(done, 2, "run `tuneyard shard JOB`")


def test_help_answers_without_heavy_imports() -> None:
    program = (
        "import sys; from orchestrator.cli import app; "
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'mlflow', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
