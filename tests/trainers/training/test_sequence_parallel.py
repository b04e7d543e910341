"""Ranks that share each sequence: rows, losses, weights, moments and metrics are those of ranks that have it whole."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.single import Samples
from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import with_
from tests.trainers.training.test_world_sizes import Heard, named_run, rows_by_step, train_with_ledger
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.slices import KINDS
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.run.folder import read_evaluations, step_name
from trainers.run.row_scores import read_row_scores
from trainers.storage import Folder

pytestmark = pytest.mark.slow
STEPS, STOP = 4, 2
RUNS = ("alone", "shared", "changing", "groups")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> dict[int, Job]:
    """By the ranks that share a sequence. Packs are of odd lengths, and keys have fewer heads than queries."""
    folder = tmp_path_factory.mktemp("shared")
    model = make_llama(folder / "model", tiny_chat_tokenizer, hidden_size=40, num_attention_heads=4)
    alone: Job = tiny_job(
        folder, model, "sft", chat_rows(60), data={"max_length": 151}, evaluate={"on": "ranks"},
        train={"global_batch_size": 4, "steps": STEPS}, checkpoint={"every_steps": 100},
    )  # fmt: skip
    alone = with_(alone, model={"attention": "documents"})
    shard_locally(alone)
    return {ranks: with_(alone, train={"sequence_parallel": ranks}) for ranks in (1, 2)}


@dataclass(frozen=True)
class Ranks:
    """What one start of ranks came to, by rank."""

    heard: list[list[Heard]]
    """Of each run."""
    apart: list[dict[str, list[float]]]
    messages: list[dict[str, str]]
    families: list[dict[str, float]]

    def heard_of(self, number: int) -> list[Heard]:
        return [rank[number] for rank in self.heard]


@pytest.fixture(scope="module")
def two(jobs: dict[int, Job], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """A sequence each, then shared, then each until the ranks begin to share, with layers computed again and in tiles;
    adapters, each and shared."""
    samples = Samples(tmp_path_factory.mktemp("families"), "own")
    models = {family: str(samples.model(family)) for family in FAMILIES}
    again = with_(jobs[2], train={"activation_checkpointing": "full", "feed_forward_tiles": True})
    plan = [(jobs[1], "alone", None), (jobs[2], "shared", None), (jobs[1], "changing", STOP),
            (again, "changing", None)]  # fmt: skip
    lora = {"lora": LoraSection(rank=2)}
    plan += [(with_(job, model=lora, train={"steps": 2}), f"adapters-{ranks}", None) for ranks, job in jobs.items()]
    return Ranks(*zip(*run_ranks(work, 2, plan, tuple(FAULTS), models), strict=True))


@pytest.fixture(scope="module")
def four(jobs: dict[int, Job]) -> Ranks:
    """Two groups of two."""
    return Ranks(*zip(*run_ranks(work, 4, [(jobs[2], "groups", None)], (), {}), strict=True))


def work(
    plan: list[tuple[Job, str, int | None]], faults: tuple[str, ...], models: dict[str, str]
) -> tuple[Any, Any, Any, Any]:
    """A rank's runs, in which the loss comes from the output layer in chunks; attention; what faults are answered;
    families."""
    from trainers.model import tiles
    from trainers.tasks.losses import chunked

    chunked.LEAST_VOCABULARY, tiles.TILE = 1, 50
    heard = train_with_ledger(plan)
    messages = {fault: message_of(plan[1][0], fault) for fault in faults}
    return heard, attend_both(), messages, {family: shared_gradients(path) for family, path in models.items()}


def test_a_group_trains_on_rows_of_its_own_and_all_of_its_ranks_on_the_same(two: Ranks, four: Ranks) -> None:
    alone, shared, groups = two.heard_of(0), two.heard_of(1), four.heard_of(0)
    assert shared[0].rows == shared[1].rows
    assert groups[0].rows == groups[1].rows and groups[2].rows == groups[3].rows != groups[0].rows
    wanted = {step: sorted(rows) for step, rows in rows_by_step(alone).items()}
    for ranks in (shared[:1], groups[::2]):
        assert {step: sorted(rows) for step, rows in rows_by_step(ranks).items()} == wanted


@pytest.mark.parametrize("field", ["loss", "grad_norm"])
def test_losses_and_norms_are_those_of_whole_sequences(two: Ranks, four: Ranks, field: str) -> None:
    alone, shared, before, after, *adapters = (heard.by_step(field) for heard in two.heard[0])
    assert list(alone) == [1, 2, 3, 4] and list(before) == [1, 2] and list(after) == [3, 4]
    for found in (shared, before | after, four.heard[0][0].by_step(field)):
        assert found == pytest.approx(alone, abs=1e-5)
    assert list(adapters[0]) == [1, 2] and adapters[1] == pytest.approx(adapters[0], abs=1e-5)


def test_weights_and_moments_are_those_of_whole_sequences(two: Ranks, four: Ranks, jobs: dict[int, Job]) -> None:
    runs = Folder(jobs[1].storage) / "runs"
    readers = [CheckpointReader(LocalCopies(runs / name / "checkpoints" / step_name(STEPS))) for name in RUNS]
    for name, shape in readers[0].state.shapes.items():
        for kind in KINDS:
            alone, *others = (reader.read(kind, name, 0, int(np.prod(shape))) for reader in readers)
            assert max(float(other.sub(alone).abs().max()) for other in others) <= 1e-5, (kind, name)


def test_ranks_that_share_score_each_row_once(two: Ranks, four: Ranks, jobs: dict[int, Job]) -> None:
    found = {}
    for name in RUNS:
        run = named_run(jobs[2], name)
        records = [each for each in read_evaluations(run.folder, run.shards.eval.key) if each.step == STEPS]
        assert [each.status for each in records] == ["done"] and records[0].rows == 12
        found[name] = read_row_scores(run.folder, STEPS)
    alone = found.pop("alone")
    for scores in found.values():
        assert scores.keys() == alone.keys() >= {"row", "loss_sum", "targets", "correct"}
        for name, values in scores.items():
            assert np.allclose(values, alone[name], atol=1e-3 if name == "loss_sum" else 0), name


FAULTS = {
    "heads": "exchange come out in a wrong order",
    "positions": "exchange come out in a wrong order",
    "keys": r"compute something else .* differ by 0\.00[1-9]",
}


def test_mixed_up_parts_end_before_the_first_step(two: Ranks) -> None:
    for messages in two.messages:
        assert messages.keys() == FAULTS.keys()
        for fault, message in messages.items():
            assert re.search(FAULTS[fault], message), fault


def message_of(job: Job, fault: str) -> str:
    """What a run says in which a rank gets back other heads or positions, or queries meet the keys of other heads."""
    from trainers.architecture import document_attention, sequence_parallel
    from trainers.errors import TrainingError

    group, share = sequence_parallel.SequenceGroup, sequence_parallel.shared_states
    to_heads, to_positions = group.own_heads, group.own_positions
    try:
        if fault == "heads":
            group.own_positions = lambda own, states: to_positions(own, states).flip(2)  # type: ignore[method-assign]
        elif fault == "positions":
            group.own_heads = lambda own, states: to_heads(own, states).flip(2)  # type: ignore[method-assign]
        else:
            document_attention.shared_states = lambda own, query, *others: share(own, query.flip(1), *others)
        train_with_ledger([(job, f"mixed {fault}", None)])
    except TrainingError as error:
        return str(error)
    finally:
        group.own_heads, group.own_positions = to_heads, to_positions  # type: ignore[method-assign]
        document_attention.shared_states = share
    return "it trained"


CASES = {
    "heads divide": {"heads": 8, "fewer": 4},
    "one head of keys": {"heads": 8, "fewer": 1},
    "neither divides": {"heads": 12, "fewer": 3},
    "window": {"heads": 8, "fewer": 4, "window": 5},
    "sinks": {"heads": 8, "fewer": 2, "sinks": True},
}


def test_attention_and_its_gradients_are_those_of_the_whole_row(two: Ranks, four: Ranks) -> None:
    for apart in (*two.apart, *four.apart):
        assert apart.keys() == CASES.keys() and max(max(each) for each in apart.values()) < 1e-12, apart


def attend_both() -> dict[str, list[float]]:
    """How far output and gradients of a rank's part lie from those of the whole row, in fp64."""
    import torch

    from trainers.architecture.document_attention import attend
    from trainers.architecture.sequence_parallel import join_group
    from trainers.model.world import join_world

    world = join_world(1, 0)
    group, found = join_group(world.rank, world.size, world.size), {}
    bounds, positions = torch.tensor([0, 7, 8, 24], dtype=torch.int32), 24
    part = slice(world.rank * positions // world.size, (world.rank + 1) * positions // world.size)
    for name, case in CASES.items():
        torch.manual_seed(0)
        shapes = [(1, case["heads"], positions, 6), *[(1, case["fewer"], positions, 6)] * 2]
        whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        own = [states.detach()[:, :, part].clone().requires_grad_() for states in whole]
        sinks = torch.randn(case["heads"], dtype=torch.float64) if "sinks" in case else None
        slope = torch.randn(1, positions, case["heads"], 6, dtype=torch.float64)
        options: Any = {"cu_seq_lens_q": bounds, "max_length_q": positions, "s_aux": sinks,
                        "sliding_window": case.get("window"), "scaling": 0.3}  # fmt: skip
        wanted, _ = attend(None, *whole, None, **options)
        said, _ = attend(None, *own, None, sequence_group=group, **options)
        (wanted * slope).sum().backward()
        (said * slope[:, part]).sum().backward()
        gradients = ((mine.grad, every.grad[:, :, part]) for mine, every in zip(own, whole, strict=True))
        found[name] = [float((one - two).abs().max()) for one, two in ((said, wanted[:, part]), *gradients)]
    return found


FAMILIES = ("llama", "gemma3_text", "gemma4_text", "llama4_text", "deepseek_v3", "gpt2", "gpt_neox", "phi3",
            "gpt_bigcode", "cohere2", "smollm3", "exaone4", "mistral")  # fmt: skip
"""Windows, chunks of attention, values of another width than keys, one head of keys, positions that are learned or left
out, fused projections."""


def test_families_learn_the_same_from_shared_rows(two: Ranks) -> None:
    for found in two.families:
        assert found.keys() == set(FAMILIES) and max(found.values()) < 1e-5, found


def shared_gradients(path: str) -> float:
    """How far loss and gradients of two rows, added up over the ranks that share them, lie from those of whole rows, as
    a share of the largest of each."""
    import torch
    import torch.distributed as dist

    from trainers.architecture.sequence_parallel import join_group
    from trainers.tasks import Example, TaskOptions, load_task

    group = join_group(dist.get_rank(), dist.get_world_size(), dist.get_world_size())
    task, draw = load_task("pretrain", TaskOptions(packing=True)), np.random.default_rng(0)
    rows = [Example(at, draw.integers(5, 30, size).astype(np.int32), {}) for at, size in enumerate((16, 9, 4, 17, 3))]
    batch = task.collate([rows[:3], rows[3:]], 0)
    options = {"dtype": torch.float32, "attn_implementation": "documents"}
    model = task.load_model(path, pad_id=0, trust_remote_code=False, **options).eval()
    found = []
    for each in (batch, batch.part(group.place, group.size)):
        loss = task.step_loss(model, *each.to("cpu"), each.targets("cpu"))
        slopes = torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad], allow_unused=True)
        found.append([loss.detach(), *(slope for slope in slopes if slope is not None)])
    for part in found[1]:
        dist.all_reduce(part)
    pairs = zip(*found, strict=True)
    return max(float((whole - part).abs().max() / whole.abs().max().clamp_min(1e-9)) for whole, part in pairs)


def test_a_batch_comes_in_parts(tiny_chat_tokenizer: Path) -> None:
    """All of it once, in order, filled up at the end."""
    from trainers.tasks import Example, TaskOptions, load_task
    from trainers.tasks.base import IGNORE

    task = load_task("pretrain", TaskOptions(packing=True))
    rows = [Example(at, np.arange(5, 5 + length, dtype=np.int32), {}) for at, length in enumerate((7, 4, 9))]
    batch = task.collate([rows[:2], rows[2:]], 0)
    parts = [batch.part(place, 4) for place in range(4)]
    assert batch.labels.size == 22 and {part.labels.shape for part in parts} == {(1, 6)}
    for name in ("input_ids", "position_ids", "documents"):
        row = np.concatenate([part.inputs[name] for part in parts], 1)[0]
        assert np.array_equal(row[:22], batch.inputs[name].ravel())
    labels = np.concatenate([part.labels for part in parts], 1)[0]
    assert np.array_equal(labels[:22], batch.labels.ravel()) and (labels[22:] == IGNORE).all()
    bounds = batch.inputs["bounds"].tolist()
    assert bounds[-1] == 22 and all(part.inputs["bounds"].tolist() == [*bounds[:-1], 24] for part in parts)
    assert batch.inputs.keys() | {"shared"} == parts[0].inputs.keys()
