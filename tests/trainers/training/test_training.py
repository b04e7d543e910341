"""The training loop under real ZeRO, several gloo ranks: exact resume, invariant gradients, every ZeRO stage.

Starting two ranks and importing DeepSpeed takes about ten seconds, so each launch goes through several runs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import chat_rows, film_rows, make_bert, make_llama, shard_locally, tiny_job
from trainers.batching.batches import StepSource
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.deepspeed_config import job_batches
from trainers.records import Phase, StopReason
from trainers.run.events import Event, StepEvent
from trainers.run.record import find_run
from trainers.storage import Folder

pytestmark = pytest.mark.slow


@dataclass
class Recorder:
    """Hooks that keep what they are told, and ask for a stop after a step."""

    stop_after: int | None = None
    events: list[Event] = field(default_factory=list)
    step: int = 0

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def stop_reason(self) -> StopReason | None:
        return "preempted" if self.stop_after and self.step >= self.stop_after else None

    def at(self, phase: Phase, step: int) -> None:
        self.step = step + (phase == "settle")  # then the next step is agreed on


def train_here(job: Job, run: str, stop_after: int | None = None) -> dict[int, float]:
    """Train as one rank into a run folder of that name; losses by step (rank 0's record, empty elsewhere)."""
    from trainers.run.record import find_run
    from trainers.tasks.losses import chunked
    from trainers.worker.rank import run_rank

    hooks = Recorder(stop_after)
    chunked.LEAST_VOCABULARY = 1 if "chunks" in run else 8192
    run_rank(find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / run}), hooks)
    return {event.step: event.loss for event in hooks.events if isinstance(event, StepEvent)}


def train_all(plan: list[tuple[Job, str, int | None]]) -> list[dict[int, float]]:
    """Several runs, one after the other, in the same processes."""
    return [train_here(*one) for one in plan]


def with_(job: Job, **sections: Any) -> Job:
    updated = {name: getattr(job, name).model_copy(update=values) for name, values in sections.items()}
    return job.model_copy(update=updated)


@pytest.fixture(scope="module")
def film_job(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Job:
    folder = tmp_path_factory.mktemp("film")
    job: Job = tiny_job(folder, make_bert(folder / "model", tiny_tokenizer), "classify", film_rows(60))
    shard_locally(job)
    return job


@pytest.fixture(scope="module")
def chat_job(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Job:
    folder = tmp_path_factory.mktemp("chat")
    model = make_llama(folder / "model", tiny_chat_tokenizer)
    job: Job = tiny_job(folder, model, "sft", chat_rows(60), data={"max_length": 256}, train={"global_batch_size": 4})
    shard_locally(job)
    return job


MANY_LENGTHS = [("zero0", 1), ("zero1", 1), ("zero2", 1), ("zero2", 8), ("zero3", 1), ("zero3", 8)]


def many_lengths(job: Job, way: str, micro: int) -> Job:
    """Rows of their own, of which a step takes 8 for each rank."""
    train = {"deepspeed": way, "global_batch_size": 16, "micro_batch_size": micro, "steps": 3, "epochs": None}
    return with_(job, train=train, data={"packing": False})


@pytest.fixture(scope="module")
def two_ranks(film_job: Job, chat_job: Job) -> dict[str, dict[int, float]]:
    """Losses of many runs of two ranks, in one launch."""
    frozen = with_(film_job, model={"freeze": ("bert.embeddings.*",)})
    bf16 = with_(chat_job, model={"dtype": "bfloat16"})
    zero2, offload = (
        with_(chat_job, train={"deepspeed": "zero2"}),
        with_(chat_job, train={"deepspeed": "zero3-cpu-offload"}),
    )
    again = with_(chat_job, train={"activation_checkpointing": "full"})
    adapters = with_(chat_job, model={"lora": LoraSection(rank=2)})
    zero0 = with_(chat_job, train={"deepspeed": "zero0", "micro_batch_size": 1})
    half_zero0, frozen_zero0 = (with_(job, train={"deepspeed": "zero0"}) for job in (bf16, frozen))
    one_by_one = with_(chat_job, train={"micro_batch_size": 1})
    whole = {"steps": None, "epochs": 1.0, "global_batch_size": 64}  # one step, cut short, holds the whole set
    packed, unpacked = with_(chat_job, train=whole), with_(chat_job, train=whole, data={"packing": False})
    plan: dict[str, tuple[Job, str, int | None]] = {
        "dropout": (film_job, "dropout", None),
        "dropout stopped": (film_job, "dropout-again", 4),
        "dropout resumed": (film_job, "dropout-again", None),
        "chat": (chat_job, "chat", None),
        "chat stopped": (chat_job, "chat-for-one", 3),
        "bf16": (bf16, "bf16", None),
        "bf16 stopped": (bf16, "bf16-again", 2),
        "bf16 resumed": (bf16, "bf16-again", None),
        "frozen stopped": (frozen, "frozen", 2),
        "frozen resumed": (frozen, "frozen", None),
        "zero2": (zero2, "zero2", None),
        "zero2 stopped": (zero2, "zero2-again", 3),
        "zero2 resumed": (zero2, "zero2-again", None),
        "zero0": (zero0, "zero0", None),
        "zero0 stopped": (zero0, "zero0-again", 3),
        "zero0 resumed": (zero0, "zero0-again", None),
        "zero3 then zero0 a": (chat_job, "to-zero0", 3),
        "zero3 then zero0 b": (zero0, "to-zero0", None),
        "zero0 then zero2 a": (zero0, "to-zero2", 3),
        "zero0 then zero2 b": (zero2, "to-zero2", None),
        "zero0 bf16": (half_zero0, "zero0-bf16", None),
        "zero0 bf16 stopped": (half_zero0, "zero0-bf16-again", 2),
        "zero0 bf16 resumed": (half_zero0, "zero0-bf16-again", None),
        "zero0 frozen stopped": (frozen_zero0, "zero0-frozen", 2),
        "zero0 frozen resumed": (frozen_zero0, "zero0-frozen", None),
        "offload stopped": (offload, "offload", 3),
        "offload resumed": (offload, "offload", None),
        "one by one": (one_by_one, "one-by-one", None),
        "unpacked": (unpacked, "unpacked", None),
        "packed": (packed, "packed", None),
        "layers again": (again, "layers-again", None),
        "adapters": (adapters, "adapters", None),
        "adapters, layers again": (with_(adapters, train={"activation_checkpointing": "full"}), "adapters-again", None),
        "chunks": (chat_job, "chunks", None),
        "zero2 chunks": (zero2, "zero2-chunks", None),
        **{f"many lengths {way} {micro}": (many_lengths(chat_job, way, micro), f"{way}-{micro}", None)
           for way, micro in MANY_LENGTHS},
    }  # fmt: skip
    losses = run_ranks(train_all, 2, list(plan.values()))[0]
    return dict(zip(plan, losses, strict=True))


def test_layers_that_are_computed_again_train_alike(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["layers again"] == two_ranks["chat"]
    assert two_ranks["adapters, layers again"] == two_ranks["adapters"]


@pytest.mark.parametrize("kind", ["chunks", "zero2 chunks"])
def test_a_loss_computed_in_chunks_trains_alike(two_ranks: dict[str, dict[int, float]], kind: str) -> None:
    assert two_ranks[kind] == pytest.approx(two_ranks["chat"], rel=1e-5)


def test_the_loss_falls(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["chat"][6] < two_ranks["chat"][1] - 0.1


def test_a_run_that_was_stopped_goes_on_bit_for_bit_dropout_included(two_ranks: dict[str, dict[int, float]]) -> None:
    assert list(two_ranks["dropout stopped"]) == [1, 2, 3, 4]
    assert list(two_ranks["dropout resumed"]) == [5, 6]
    assert two_ranks["dropout stopped"] | two_ranks["dropout resumed"] == two_ranks["dropout"]


def test_bf16_resumes_bit_for_bit(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["bf16 stopped"] | two_ranks["bf16 resumed"] == two_ranks["bf16"]


def test_zero2_resumes_bit_for_bit_and_trains_as_zero3(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["zero2 stopped"] | two_ranks["zero2 resumed"] == two_ranks["zero2"]
    assert two_ranks["zero2"] == pytest.approx(two_ranks["chat"], abs=1e-5)


def test_without_deepspeed_the_steps_are_those_of_zero3(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["zero0"] == pytest.approx(two_ranks["chat"], abs=1e-5)
    assert two_ranks["zero0 bf16"] == pytest.approx(two_ranks["bf16"], abs=5e-3)
    frozen = two_ranks["zero0 frozen stopped"] | two_ranks["zero0 frozen resumed"]
    assert frozen == pytest.approx(two_ranks["frozen stopped"] | two_ranks["frozen resumed"], abs=1e-5)


def test_without_deepspeed_a_run_goes_on_bit_for_bit(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["zero0 stopped"] | two_ranks["zero0 resumed"] == two_ranks["zero0"]
    assert two_ranks["zero0 bf16 stopped"] | two_ranks["zero0 bf16 resumed"] == two_ranks["zero0 bf16"]


def test_a_run_goes_on_at_another_stage_with_the_same_losses(two_ranks: dict[str, dict[int, float]]) -> None:
    for first, then in (("zero3 then zero0 a", "zero3 then zero0 b"), ("zero0 then zero2 a", "zero0 then zero2 b")):
        assert list(two_ranks[then]) == [4, 5, 6]
        assert two_ranks[first] | two_ranks[then] == pytest.approx(two_ranks["chat"], abs=1e-5)


def test_cpu_offload_trains_and_resumes_as_zero3(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["offload stopped"] | two_ranks["offload resumed"] == pytest.approx(two_ranks["chat"], abs=1e-5)


def test_frozen_parameters_resume_and_stay(two_ranks: dict[str, dict[int, float]], film_job: Job) -> None:
    from safetensors.torch import load_file

    from trainers.checkpoint.local_copies import LocalCopies
    from trainers.checkpoint.reading import CheckpointReader

    assert list(two_ranks["frozen resumed"]) == [3, 4, 5, 6]
    checkpoint = Folder(film_job.storage) / "runs" / "frozen" / "checkpoints" / "step-00000006"
    reader = CheckpointReader(LocalCopies(checkpoint))
    before = load_file(Path(film_job.model.path) / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert reader.read("weight", f"bert.{name}", 0, before[name].numel()).equal(before[name].flatten())
    layer = "encoder.layer.0.output.dense.weight"
    assert not reader.read("weight", f"bert.{layer}", 0, before[layer].numel()).equal(before[layer].flatten())
    assert f"bert.{name}" not in reader.state.trainable


def test_the_gradient_does_not_depend_on_the_micro_batch(two_ranks: dict[str, dict[int, float]]) -> None:
    assert two_ranks["one by one"] == pytest.approx(two_ranks["chat"], abs=1e-5)


@pytest.mark.parametrize(("way", "micro"), MANY_LENGTHS)
def test_the_gradient_does_not_depend_on_the_way_rows_of_many_lengths_are_cut(
    two_ranks: dict[str, dict[int, float]], chat_job: Job, way: str, micro: int
) -> None:
    """Micro-batches of a step are fewer than of its longest rows, whatever DeepSpeed was told of their number."""
    job = many_lengths(chat_job, way, micro)
    run = find_run(job)
    shards = run.open_shards("train", run.load_task())
    packs, plan = index_packs(job, shards), job_batches(job, 2)
    source = StepSource(shards, packs, job_order(job, len(packs)), plan, 0, run.load_task(), 0, overhead=5000.0)
    assert len(source.next(0).micro_batches) < max(plan.rounds, 2)
    assert two_ranks[f"many lengths {way} {micro}"] == pytest.approx(two_ranks["many lengths zero0 1"], abs=1e-5)


def test_the_loss_does_not_depend_on_packing(two_ranks: dict[str, dict[int, float]], chat_job: Job) -> None:
    """One step over the whole set, packed and not: the mean over target tokens is the same number.

    The step holds fewer sequences than its global batch, and at another rank none at all.
    """
    from tests.tiny import load_written

    shards = load_written(chat_job)
    assert shards is not None
    assert shards.train.total("rows") == 48
    assert list(two_ranks["packed"]) == list(two_ranks["unpacked"]) == [1]
    assert two_ranks["packed"][1] == pytest.approx(two_ranks["unpacked"][1], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_world_size_goes_on_with_the_same_losses(
    two_ranks: dict[str, dict[int, float]], chat_job: Job, world_size: int
) -> None:
    """From two ranks' checkpoint of step 3; at three ranks the global batch of 12 sequences must divide."""
    if world_size == 3:
        wide = with_(chat_job, train={"global_batch_size": 12})
        expected = run_ranks(train_all, 2, [(wide, "wide", None), (wide, "wide-stopped", 3)])[0]
        found = run_ranks(train_all, 3, [(wide, "wide-stopped", None)])[0][0]
        assert found == pytest.approx({step: expected[0][step] for step in (4, 5, 6)}, abs=1e-5)
        return
    found = run_ranks(train_all, 1, [(chat_job, "chat-for-one", None)])[0][0]
    assert found == pytest.approx({step: two_ranks["chat"][step] for step in (4, 5, 6)}, abs=1e-5)
