"""A warm evaluator swaps weights: what it says is what a fresh one says, and whatever does not fit is loaded anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.evaluation.task import score
from tests.trainers.tasks.small import small_jobs, with_head
from trainers.evaluation import warm
from trainers.evaluation.evaluate import combine, evaluate_model
from trainers.run.record import Run, find_run

NAMES = ("classify causal", "tag", "T5", "sft", "mlm", "cosine")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_jobs(tmp_path_factory.mktemp("warm"))


def changed(run: Run, folder: Path, seed: int) -> Path:
    """An export with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    (file,) = with_head(run, folder).glob("*.safetensors")
    torch.manual_seed(seed)
    save_file({name: value + 0.1 * torch.randn_like(value) for name, value in load_file(file).items()}, file,
              {"format": "pt"})  # fmt: skip
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_swapped_weights_say_what_freshly_loaded_ones_say(
    jobs: dict[str, Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = find_run(jobs[name])
    folders = [str(changed(run, tmp_path / f"step-{seed}", seed)) for seed in (1, 2)]
    monkeypatch.setattr(warm, "_kept", {})
    task = run.load_task()
    fresh = [evaluate_model(run.job, task, folder, run.open_shards("eval", task))[1] for folder in folders]
    first = score(run, folders[0], 0)
    monkeypatch.setattr(warm, "load_for_scoring", lambda *_: pytest.fail("the model was loaded again"))
    for expected, found in zip(fresh, (first, score(run, folders[1], 0)), strict=True):
        _, numbers = combine(task, [found[""]], len(run.open_shards("eval", task).lengths))
        assert numbers.keys() == expected.keys()
        assert all(np.array_equal(numbers[column], values) for column, values in expected.items())
    assert not np.array_equal(fresh[0]["loss_sum"], fresh[1]["loss_sum"])


def test_a_folder_that_does_not_fit_is_loaded_anew_and_changes_nothing(jobs: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = find_run(jobs["tag"])
    model = warm.load_for_scoring(run.job, run.load_task(), str(with_head(run, tmp_path / "a"))).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (file,) = changed(run, tmp_path / "b", 1).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    for other in ({**weights, "more": weights[name].clone()}, {k: v for k, v in weights.items() if k != name},
                  {**weights, name: weights[name][:1].clone()}):  # fmt: skip
        save_file(other, file, {"format": "pt"})
        assert not warm.swap_weights(model, file.parent)
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    save_file(weights, file, {"format": "pt"})
    assert warm.swap_weights(model, file.parent)
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items() if key in weights)


def test_a_large_model_is_not_kept(jobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find_run(jobs["tag"])
    monkeypatch.setattr(warm, "MOST_BYTES", 1000)
    score(run, str(with_head(run, tmp_path / "a")), 0)
    assert not warm._kept
