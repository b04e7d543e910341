"""Evaluations with a GPU each leave the model in their process too, and take the GPU that Ray gives to each of them."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.evaluation import one_gpu
from orchestrator.evaluation.one_gpu import on_own_gpu, place_of
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.evaluation.test_warm import changed
from trainers.evaluation import placement
from trainers.model import world
from trainers.run.record import find_run


@pytest.mark.parametrize(
    "ids, visible, place",
    [
        (["1"], None, 1),
        (["3"], "5,3", 1),
        (["GPU-b"], "GPU-a,GPU-b", 1),
        (["1"], "0", ValueError),
        ([], "", None),
        ([], None, None),
    ],
)
def test_a_gpu_is_found_by_the_name_that_ray_has_for_it(ids: list[str], visible: str | None, place: Any) -> None:
    if place is ValueError:
        with pytest.raises(ValueError, match="not in list"):
            place_of(ids, visible)
    else:
        assert place_of(ids, visible) == place


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Any]:
    """On a Ray that is said to have two GPUs; its nvidia-smi tells of other two."""
    folder = tmp_path_factory.mktemp("two-gpus")
    (folder / "nvidia-smi").write_text("#!/bin/sh\nprintf '81559\\n4096\\n'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return evaluate_thrice(folder, tiny_tokenizer, 2)


def evaluate_thrice(folder: Path, tokenizer: Path, gpus: int) -> dict[str, Any]:
    """What `two_gpus` saw: in one process twice, then in another."""
    job = tiny_job(folder, make_bert(folder / "model", tokenizer), "classify", film_rows(40))
    shard_locally(job)
    run = find_run(job)
    paths = [str(changed(run, folder / f"step-{seed}", seed)) for seed in (1, 2)]
    (folder / "run.json").write_text(run.model_dump_json())
    module = "tests.orchestrator.evaluation.two_gpus"
    words = [sys.executable, "-m", module, str(folder / "run.json"), str(gpus), *paths]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    if gpus:
        kept.pop("CUDA_VISIBLE_DEVICES", None)
    kept["PATH"] = f"{folder}:{kept['PATH']}"
    done = subprocess.run(words, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    first, second, third = found["evaluations"]
    assert first["process"] == second["process"] != third["process"]
    assert [one["kept"] for one in (first, second, third)] == [False, True, False]
    assert first["loss"] != second["loss"] == third["loss"]
    return found


@pytest.mark.cluster
def test_a_process_evaluates_twice_on_the_gpu_of_each_time_and_ends(seen: dict[str, Any]) -> None:
    first, second, third = seen["evaluations"]
    assert first["gpu"] != second["gpu"] == third["gpu"] and seen["held"] == 1
    assert all(one["claimed"] == int(one["gpu"]) and one["job"] == "yes" for one in (first, second, third))


@pytest.mark.cluster
def test_the_smallest_gpu_is_the_one_that_nodes_tell_of(seen: dict[str, Any]) -> None:
    """The memory of a cluster's GPUs is what its nodes say, not what the driver's machine has."""
    assert seen["memory"] == {"driver": None, "smallest": 4096 * 2**20}


@pytest.mark.cluster
def test_the_room_of_ranks_tells_the_gpus_that_they_may_take(seen: dict[str, Any]) -> None:
    assert sorted(seen["room"]) == ["0", "1"]


@pytest.fixture
def _in_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a task of Ray; a process that ends raises SystemExit."""
    monkeypatch.setattr(one_gpu, "_this", one_gpu._Process())
    monkeypatch.setattr(world, "_claimed", [])
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    if one_gpu._this.leaves:
        one_gpu._this.leaves.cancel()


def with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": [gpu]})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)


@pytest.mark.usefixtures("_in_task")
def test_only_the_tasks_gpu_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: asked.append(gpu) or (80 << 30, 80 << 30))
    for name in ("set_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *gpu: asked.extend(gpu))

    def look() -> Any:
        device = world.pick_device("auto")
        return str(device), [gpu for gpu in placement.device_memory(device) if gpu != "cpu"]

    for gpu in (2, 1):
        with_gpu(monkeypatch, str(gpu))
        assert on_own_gpu(look) == (f"cuda:{gpu}", [gpu])
        assert set(asked) == {gpu}
        asked.clear()


@pytest.mark.usefixtures("_in_task")
def test_what_a_failed_evaluation_held_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, "0")
    held: list[weakref.ref[Any]] = []

    def fails() -> None:
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))
        raise ValueError(model)

    with pytest.raises(ValueError) as caught:
        on_own_gpu(fails)
    caught.value.args = ()
    gc.collect()
    assert held[0]() is None and caught.value.__traceback__


@pytest.mark.usefixtures("_in_task")
def test_a_process_in_which_cuda_failed_takes_no_other_task(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, "0")

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(one_gpu, "free_memory", broken)
        assert on_own_gpu(lambda: "said") == "said"
    assert one_gpu._this.leaves and one_gpu._this.leaves.interval == one_gpu.REPLY_S
    with pytest.raises(SystemExit):
        on_own_gpu(lambda: pytest.fail("it ran"))


@pytest.mark.usefixtures("_in_task")
def test_of_a_card_in_parts_a_process_keeps_the_first_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, part in enumerate(("MIG-b", "MIG-b", "MIG-a")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")  # as Ray leaves it after each task
        with_gpu(monkeypatch, part)
        if number < 2:
            assert on_own_gpu(lambda: os.environ["CUDA_VISIBLE_DEVICES"]) == "MIG-b"
        else:
            with pytest.raises(SystemExit):
                on_own_gpu(lambda: pytest.fail("it ran"))
    assert world._claimed == []
