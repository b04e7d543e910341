"""A model that no single device holds is spread by a device map, and says of every row what it says on one device."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.evaluation.test_predict import with_head
from tests.trainers.tasks.small import small_jobs
from trainers.evaluation import placement, warm
from trainers.evaluation.evaluate import evaluate_model, load_for_scoring, plan_sets
from trainers.run.record import find_run
from trainers.tasks.losses import chunked

TASKS = ("classify causal", "tag", "extract", "cosine", "T5", "sft", "pretrain", "mlm")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_jobs(tmp_path_factory.mktemp("placement"))


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_fits_no_device_is_spread_and_scores_alike(
    jobs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    chunks: bool,
) -> None:
    """Host memory holds half of it, the disk the rest; the loss in chunks reads the output layer's weights itself."""
    if chunks:
        monkeypatch.setattr(chunked, "LEAST_VOCABULARY", 1)
    run = find_run(jobs[name])
    folder = with_head(run, tmp_path / "model")
    shards, weights = run.open_shards("eval", run.load_task()), (folder / "model.safetensors").stat().st_size
    placed = []
    load = placement.load_to_evaluate

    def look(*words: Any) -> tuple[Any, Any]:
        model, device = load(*words)
        placed.append(set(getattr(model, "hf_device_map", {}).values()))
        return model, device

    monkeypatch.setattr("trainers.evaluation.evaluate.load_to_evaluate", look)
    _, whole = evaluate_model(run.job, run.load_task(), str(folder), shards)
    monkeypatch.setattr(placement, "device_memory", lambda device: {"cpu": weights // 2})
    with caplog.at_level(logging.WARNING):
        _, spread = evaluate_model(run.job, run.load_task(), str(folder), shards)
    assert placed[0] == set() and "disk" in placed[1]
    assert "no device holds the model's" in caplog.text and "and the disk" in caplog.text
    assert whole.keys() == spread.keys()
    for key, values in whole.items():
        assert np.array_equal(values, spread[key], equal_nan=values.dtype.kind == "f"), key


def test_a_model_is_not_put_whole_on_a_gpu_without_room_because_another_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def load(**where: Any) -> Any:
        asked.append(where)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(placement, "device_memory", lambda device: {1: 100, "cpu": 100})
    model, device = placement._place(load, 10, torch.device("cuda", 0))
    assert asked[0]["max_memory"] == {1: 100, "cpu": 100} and model.device == device == torch.device("cuda", 0)


def test_a_model_that_is_spread_is_not_kept_for_the_next_evaluation(
    jobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = find_run(jobs["pretrain"])
    folder = with_head(run, tmp_path / "model")
    monkeypatch.setattr(placement, "device_memory", lambda device: {"cpu": 1000})
    monkeypatch.setattr(warm, "_kept", {})
    path, task = str(folder), run.load_task()
    loaded = load_for_scoring(run.job, task, path)
    warm.keep_warm(run, path, loaded, plan_sets(run.job, task, run.open_held(task), loaded.encoder))
    assert warm._kept == {}
