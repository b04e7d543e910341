"""What a large model needs of a step on a GPU: layers computed again, adapters, state on disk, the plan's memory, a
profile; and evaluation where no device holds the model. Each beside the plain way on the same device."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu import MARKS, has_gpu
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.tasks.small import small_jobs
from tests.trainers.training.test_offload import async_io_is_built
from tests.trainers.training.test_training import Recorder, with_
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.memory import GIB, StepShape, needs
from trainers.model.model_size import measure_size
from trainers.run.events import StepEvent

pytestmark = MARKS
TASKS = ("classify causal", "several", "tag", "extract", "T5", "mlm", "cosine", "sft")


def train_and_look(plan: list[tuple[Job, str]]) -> list[dict[str, Any]]:
    """Train each as one rank; losses by step, the peak of the device's memory, and the profile."""
    import torch

    from trainers.run.record import find_run
    from trainers.storage import Folder
    from trainers.worker.rank import run_rank

    found = []
    for job, name in plan:
        if has_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        hooks = Recorder()
        run_rank(find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / name}), hooks)
        peak = torch.cuda.max_memory_allocated() if has_gpu() else 0
        losses = {event.step: event.loss for event in hooks.events if isinstance(event, StepEvent)}
        profile = next((event for event in hooks.events if event.kind == "profile"), None)
        found.append({"losses": losses, "peak": peak, "profile": profile})
    return found


@pytest.fixture(scope="module")
def world() -> int:
    import torch

    return min(torch.cuda.device_count(), 2) if has_gpu() else 1


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Any:
    """Packed chats in bf16; on a GPU with layers whose activations outweigh everything that is small."""
    folder = tmp_path_factory.mktemp("step")
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4}
    if has_gpu():
        sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4096,
                 "num_hidden_layers": 8, "max_position_embeddings": 2048}  # fmt: skip
    model = make_llama(folder / "model", tiny_chat_tokenizer, **sizes)
    length = 2048 if has_gpu() else 256
    job = tiny_job(folder, model, "sft", chat_rows(3000 if has_gpu() else 60), data={"max_length": length},
                   train={"global_batch_size": 4, "micro_batch_size": 2, "verify": False, "learning_rate": 1e-4,
                          "activation_checkpointing": "none"})  # fmt: skip
    shard_locally(job)
    return with_(job, model={"dtype": "bfloat16", "attention": "documents"}, train={"deterministic": True})


@pytest.fixture(scope="module")
def looked(job: Job, world: int) -> dict[str, dict[str, Any]]:
    """By name, every way to make a step, in one launch."""
    plain = with_(job, train={"deepspeed": "zero0"})
    adapters = with_(plain, model={"lora": LoraSection(rank=4)})
    plan = {
        "plain": plain,
        "all layers again": with_(plain, train={"activation_checkpointing": "full"}),
        "every second layer again": with_(plain, train={"activation_checkpointing": 2}),
        "on the host": with_(plain, train={"activation_checkpointing": "full", "activation_offload": True}),
        "adapters": adapters,
        "adapters, layers again": with_(adapters, train={"activation_checkpointing": "full"}),
        "adapters, zero3": with_(adapters, train={"deepspeed": "zero3"}),
        "adapters, zero3, layers again": with_(
            adapters, train={"deepspeed": "zero3", "activation_checkpointing": "full"}
        ),
        "zero2": with_(job, train={"deepspeed": "zero2"}),
        "zero3": with_(job, train={"deepspeed": "zero3"}),
        "zero3-cpu-offload": with_(job, train={"deepspeed": "zero3-cpu-offload"}),
        "profile": with_(plain, train={"profile": True}),
    }
    if not has_gpu():
        del plan["on the host"]  # refused there
    if world > 1:
        plan["sequences shared"] = with_(job, train={"deepspeed": "zero3", "sequence_parallel": world})
    if async_io_is_built():
        place = Path(job.storage).parent / "swap"
        place.mkdir()
        on_disk = {"deepspeed": "zero3-nvme-offload", "offload_folder": str(place)}
        plan["zero3-nvme-offload"] = with_(job, train=on_disk)
    found = run_ranks(train_and_look, world, [(each, name.replace(" ", "-")) for name, each in plan.items()])[0]
    return dict(zip(plan, found, strict=True))


@pytest.mark.parametrize("name", ["all layers again", "every second layer again", "on the host"])
def test_layers_computed_again_give_the_same_losses_and_keep_less(looked: dict[str, dict[str, Any]], name: str) -> None:
    if name not in looked:
        pytest.skip("without a GPU all activations are on the host")
    assert looked[name]["losses"] == looked["plain"]["losses"]
    if has_gpu():
        assert looked[name]["peak"] < 0.95 * looked["plain"]["peak"]


def test_adapters_train_alike_in_every_way(looked: dict[str, dict[str, Any]]) -> None:
    plain = looked["adapters"]["losses"]
    assert plain[6] < plain[1]
    assert looked["adapters, layers again"]["losses"] == plain
    assert looked["adapters, zero3"]["losses"] == pytest.approx(plain, abs=2e-2)
    assert looked["adapters, zero3, layers again"]["losses"] == looked["adapters, zero3"]["losses"]


def test_sequences_that_devices_share_train_as_whole_ones_and_take_less(looked: dict[str, dict[str, Any]]) -> None:
    if "sequences shared" not in looked:
        pytest.skip("there are no two GPUs")
    assert looked["sequences shared"]["losses"] == pytest.approx(looked["zero3"]["losses"], abs=2e-2)
    assert looked["sequences shared"]["peak"] < 0.8 * looked["zero3"]["peak"]


def test_state_on_disk_trains_as_state_on_the_device(looked: dict[str, dict[str, Any]]) -> None:
    if "zero3-nvme-offload" not in looked:
        pytest.skip("async I/O is not built")
    assert looked["zero3-nvme-offload"]["losses"] == pytest.approx(looked["zero3"]["losses"], abs=2e-2)


@pytest.mark.parametrize(
    ("name", "way", "every"),
    [("plain", "zero0", 0), ("all layers again", "zero0", 1), ("every second layer again", "zero0", 2),
     ("zero2", "zero2", 0), ("zero3", "zero3", 0), ("zero3-cpu-offload", "zero3-cpu-offload", 0)],
)  # fmt: skip
def test_the_plan_counts_what_the_device_holds(
    looked: dict[str, dict[str, Any]], job: Job, world: int, name: str, way: str, every: int
) -> None:
    """Within a tenth and 0.3 GiB, which the libraries' own buffers may take."""
    size = measure_size(job, job.model.path)
    shape = StepShape(2, 4 // 2 // world, checkpoint_every=every)
    (counted,) = [need.counted for need in needs(size, world, shape) if need.way == way]
    assert counted > 0
    if has_gpu():
        assert abs(looked[name]["peak"] - counted) < 0.1 * counted + 0.3 * GIB


def test_a_profile_tells_kernels_waits_and_share_of_the_peak(looked: dict[str, dict[str, Any]]) -> None:
    profile = looked["profile"]["profile"]
    assert looked["profile"]["losses"] == looked["plain"]["losses"]
    assert profile.step_s > 0 and profile.operators and profile.tokens_per_s > 0
    if has_gpu():
        assert 0 < profile.busy_s <= profile.step_s and profile.waits >= 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_jobs(tmp_path_factory.mktemp("small"))


def test_every_task_trains(small: dict[str, Any]) -> None:
    jobs = {name: with_(small[name], train={"deepspeed": "zero0", "steps": 6}) for name in TASKS}
    found = run_ranks(train_and_look, 1, [(job, name.replace(" ", "-")) for name, job in jobs.items()])[0]
    assert all(each["losses"] for each in found)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_spread_over_devices_and_host_scores_alike(
    small: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the host scores alike, whose kernels are others."""
    import torch

    from tests.trainers.tasks.small import with_head
    from trainers.evaluation import evaluate, placement
    from trainers.run.record import find_run

    run = find_run(with_(small[name], scale={"gpus_per_worker": int(has_gpu())}))
    task, folder = run.load_task(), str(with_head(run, tmp_path / "model"))

    def scored() -> float:
        scores = evaluate.evaluate_model(run.job, task, folder, run.open_shards("eval", task))[1]
        return float(task.metrics(scores)["loss"])

    whole = scored()
    with monkeypatch.context() as patch:
        patch.setattr(placement, "pick_device", lambda *_: torch.device("cpu"))
        assert scored() == pytest.approx(whole, rel=1e-3)
    if not has_gpu():
        return
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    monkeypatch.setattr(placement, "device_memory", lambda device: {device.index or 0: weights // 2, "cpu": 10 * GIB})
    assert scored() == pytest.approx(whole, rel=1e-3)
