"""State kept beyond the device: in host memory and in swap files on disk. Trained, saved from where it lies, resumed,
exported. On disk it needs DeepSpeed's async I/O, which takes minutes to build: skipped where that was not done yet."""

import json
import shutil
import threading
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

from orchestrator.run_session import check_disks
from tests.crashing import make_engine, state_digest
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.job.test_job import changed
from tests.trainers.training.test_training import train_all, with_
from trainers.batching.batch_plan import plan_batches
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.writing import CHUNK_BYTES
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.model.deepspeed_config import derive_config, read_template
from trainers.storage import Folder
from trainers.worker import swap_folder

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 2048,
         "num_hidden_layers": 3}  # fmt: skip
"""Of two ranks' partitions the nine of the feed-forward layers have 1 MiB, with which DeepSpeed puts them on disk; that
is one more than there are buffers."""


def async_io_is_built() -> bool:
    """For this installation of DeepSpeed: for another one it would be built again."""
    from importlib.util import find_spec

    from torch.utils.cpp_extension import get_default_build_root

    (place,) = find_spec("deepspeed").submodule_search_locations  # type: ignore[union-attr,misc]
    built = [path for path in Path(get_default_build_root()).glob("*/async_io") if (path / "async_io.so").exists()]
    return any(f"-I{place}/" in (path / "build.ninja").read_text() for path in built)


WAYS = [
    "zero3-cpu-offload",
    pytest.param(
        "zero3-nvme-offload",
        marks=pytest.mark.skipif(
            not async_io_is_built(),
            reason="async I/O is not built (libaio-dev, minutes): DS_ACCELERATOR=cpu python -c "
            "'from trainers.worker.swap_folder import build_async_io; build_async_io()'",
        ),
    ),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Job:
    """Large enough for the disk; processors that cannot multiply in bf16 need minutes for it."""
    return make_job(tmp_path_factory.mktemp("offload"), tiny_chat_tokenizer, SIZES)


@pytest.fixture(scope="module")
def small_job(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Job:
    return make_job(tmp_path_factory.mktemp("small"), tiny_chat_tokenizer, {"num_hidden_layers": 3})


def make_job(folder: Path, tokenizer: Path, sizes: dict[str, int]) -> Job:
    model = make_llama(folder / "model", tokenizer, **sizes)
    plain: Job = tiny_job(
        folder, model, "sft", chat_rows(30), data={"max_length": 128},
        train={"global_batch_size": 4, "steps": 4, "verify": False},
        checkpoint={"every_steps": 2},
    )  # fmt: skip
    shard_locally(plain)
    return with_(plain, model={"dtype": "bfloat16", "freeze": ("model.layers.0.mlp.*",)})


def offloaded(job: Job, way: str) -> Job:
    """The job with groups so small that there are several, also of the small model's 38,000 weights."""
    template, folder = read_template(way), Path(job.storage).parent
    template["zero_optimization"]["sub_group_size"] = 500_000 if "nvme" in way else 8_000
    path = folder / f"{way}.json"
    path.write_text(json.dumps(template))
    on_disk = "nvme" in way
    return with_(job, train={"deepspeed": str(path), "offload_folder": str(folder / "swap") if on_disk else None})


def checkpoint_of(job: Job, run: str, step: int) -> CheckpointReader:
    return CheckpointReader(LocalCopies(Folder(job.storage) / "runs" / run / "checkpoints" / f"step-{step:08d}"))


def values(reader: CheckpointReader) -> dict[str, Any]:
    """Every weight and moment of a checkpoint, whole."""
    return {
        f"{kind}/{name}": reader.read(kind, name, 0, prod(shape))
        for name, shape in reader.state.shapes.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        if reader.holds(kind, name)
    }


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_state_trains_as_zero3_resumes_bit_for_bit_and_leaves_nothing_behind(
    job: Job, small_job: Job, way: str
) -> None:
    job = with_(job, model={"freeze": ()}) if "nvme" in way else small_job
    far = offloaded(job, way)
    plan = [(job, f"plain-{way}", None), (far, way, None), (far, f"{way}-again", 2), (far, f"{way}-again", None)]
    plain, undisturbed, stopped, resumed = run_ranks(train_all, 2, plan)[0]
    assert list(stopped) == [1, 2] and stopped | resumed == undisturbed
    assert undisturbed == pytest.approx(plain, abs=1e-3)
    theirs, ours = values(checkpoint_of(job, way, 4)), values(checkpoint_of(job, f"{way}-again", 4))
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(ours[name]) for name in theirs)
    before = values(checkpoint_of(job, way, 2))
    unchanged = {name for name in theirs if name.startswith("weight/") and theirs[name].equal(before[name])}
    frozen = {name for name in theirs if ".0.mlp." in name} if job.model.freeze else set()
    assert unchanged == frozen, "what is frozen, and nothing else"
    assert not list(Path(job.storage).parent.glob("swap/*"))


@pytest.mark.parametrize("way", WAYS[1:])
def test_frozen_weights_are_refused_on_disk(job: Job, way: str) -> None:
    with pytest.raises(AssertionError, match=r"frozen weights .* would be on disk"):
        run_ranks(train_all, 2, [(offloaded(job, way), "frozen", None)])


def save_and_measure(place: str, offloads: bool) -> tuple[int, int, int]:
    """Bytes of a checkpoint's files, of host memory that saving says it holds, and by how much memory grew at the most
    from before the first save to the end of the second."""
    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width=1500, offload=offloads)
    engine.backward(engine(torch.ones(4, 1500)).square().mean())
    engine.step()
    events: list[Any] = []
    agent = Checkpointer(engine, Folder(place), world, new_attempt(world), "key", "job", events.append)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    held = agent.prepare()
    for step in (1, 2):
        agent.save(Progress(step, 4))
        agent.finish()
    grown = resident("VmHWM") - before
    agent.close()
    return events[-1].bytes, held, grown


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_a_save_of_offloaded_state_needs_no_second_copy_of_it_in_memory(tmp_path: Path) -> None:
    ((written, held, grown),) = run_ranks(save_and_measure, 1, str(tmp_path / "offloaded"), True)
    assert written > 100_000_000
    assert held == CHUNK_BYTES
    assert grown < 24 << 20
    ((same, copied, more),) = run_ranks(save_and_measure, 1, str(tmp_path / "kept"), False)
    assert same == pytest.approx(written, rel=1e-3) and copied > 100_000_000
    assert more > grown  # by less than the copy where memory that was freed before is taken again


def places_of_pieces() -> list[str]:
    """On which device a save finds each part of an offloaded state, where the device of the ranks is another."""
    from deepspeed.accelerator import get_accelerator

    from trainers.checkpoint.slices import rank_share
    from trainers.model.world import join_world

    engine = make_engine(join_world(1), width=64, offload=True)
    engine.backward(engine(torch.ones(4, 64)).square().mean())
    engine.step()
    get_accelerator().current_device_name = lambda: "meta"
    return [str(piece.live().device) for piece in rank_share(engine).pieces]


def test_a_save_reads_offloaded_state_where_it_lies_not_through_the_device() -> None:
    (places,) = run_ranks(places_of_pieces, 1)
    assert len(places) > 3 and set(places) == {"cpu"}


def save_beside_a_step(place: str, waits: bool) -> bool:
    """A save that is slower than the next step: does the checkpoint hold the state of the save?"""
    from trainers.checkpoint import host_buffer
    from trainers.checkpoint.checkpointer import Checkpointer, new_attempt
    from trainers.checkpoint.records import Progress
    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width=64, offload=True)

    def step(before_update: Any) -> None:
        engine.backward(engine(torch.ones(4, 64)).square().mean())
        before_update()
        engine.step()

    step(lambda: None)
    agent = Checkpointer(engine, Folder(place), world, new_attempt(world), "key", "job", lambda _: None)
    write, go_on = host_buffer.write_rank_file, threading.Event()
    host_buffer.write_rank_file = lambda *words: (go_on.wait(60), write(*words))[1]  # type: ignore[assignment]

    def before_update() -> None:
        if waits:
            threading.Timer(1.0, go_on.set).start()
            agent.before_update()

    before = state_digest(engine)
    agent.save(Progress(1, 4))
    assert agent.reading
    step(before_update)
    go_on.set()
    agent.finish()
    agent.resume()
    restored = state_digest(engine)
    agent.close()
    return restored == before


@pytest.mark.parametrize("waits", [True, False])
def test_an_update_waits_until_offloaded_state_is_written(tmp_path: Path, waits: bool) -> None:
    """Where it does not wait, the checkpoint holds another state: the test would see it."""
    assert run_ranks(save_beside_a_step, 1, str(tmp_path), waits) == [waits]


def nvme_job(**train: Any) -> Job:
    return parse_job(changed(train={"deepspeed": "zero3-nvme-offload", **train}, model={"path": "org/model"}))


def test_a_disk_that_is_not_named_or_not_used_is_refused(tmp_path: Path) -> None:
    def derive(job: Job) -> Any:
        return derive_config(job, plan_batches(32, "auto", 1, 128))["zero_optimization"]

    with pytest.raises(JobError, match=r"train\.offload_folder: .* name a folder there"):
        derive(nvme_job())
    assert derive(nvme_job(offload_folder="/fast"))["offload_param"]["nvme_path"] == "/fast"
    with pytest.raises(JobError, match="keeps nothing on disk"):
        derive(nvme_job(deepspeed="zero3", offload_folder="/fast"))
    with pytest.raises(JobError, match="is no disk of the node"):
        derive(nvme_job(offload_folder="s3://bucket/swap"))
    template = read_template("zero3-nvme-offload")
    template["zero_optimization"]["offload_optimizer"] |= {"nvme_path": "/other", "pipeline_write": True}
    (tmp_path / "mine.json").write_text(json.dumps(template))
    with pytest.raises(JobError) as caught:
        derive(nvme_job(deepspeed=str(tmp_path / "mine.json"), offload_folder="/fast"))
    assert [word in " ".join(caught.value.problems) for word in ("pipeline_write", "nvme_path")] == [True, True]


def test_a_machine_that_cannot_build_async_io_is_told_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if swap_folder.compiles(shutil.which("c++") or "c++"):
        assert swap_folder.async_io_problem() is None
    monkeypatch.setattr(swap_folder, "PROBE", "#include <no_such_header.h>")
    problem = str(swap_folder.async_io_problem())
    assert "lacks libaio with its headers" in problem and "apt install libaio-dev" in problem
    monkeypatch.setattr(swap_folder, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    assert "the CUDA toolkit with nvcc" in str(swap_folder.async_io_problem())
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    assert "CUDA" not in str(swap_folder.async_io_problem())
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "a C++ compiler" in str(swap_folder.async_io_problem())
    with pytest.raises(JobError, match="a C"):
        check_disks([None, swap_folder.async_io_problem()])
