"""The self-tests pass on the code as it is; each broken version of it is caught by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_job
from tests.trainers.tasks import small
from trainers.batching.batches import StepSource
from trainers.batching.order import Order
from trainers.job.schema import Job
from trainers.model.source import find_model
from trainers.tasks.base import Batch
from trainers.tasks.causal import CausalTask
from trainers.tasks.classify import Classify
from trainers.tasks.mlm import Mlm
from trainers.tasks.pretrain import Pretrain
from trainers.tasks.tag import Tag
from trainers.training import loop
from trainers.verification import checks, sample
from trainers.verification.sample import CheckContext, make_context
from trainers.verification.verdict import read_verification
from trainers.verification.verify import run_checks, verify_job


def uneven_rows(count: int) -> list[dict[str, Any]]:
    """Texts of one to four sentences, so that documents have unequal numbers of targets."""
    return [{"text": " ".join(["the old dog ran ."] * (1 + index % 4))} for index in range(count)]


def uneven_tags(count: int) -> list[dict[str, Any]]:
    rows = small.tag_rows(count)
    return [{name: values * (1 + index % 3) for name, values in row.items()} for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("verify")
    encoder, decoder = small.bert(folder / "bert"), small.llama(folder / "llama")
    labelled = [{**row, "label": "ab"[index % 2]} for index, row in enumerate(uneven_rows(40))]
    return {
        "pretrain": tiny_job(folder / "pretrain", decoder, "pretrain", uneven_rows(40)),
        "mlm": tiny_job(folder / "mlm", encoder, "mlm", uneven_rows(40)),
        "tag": tiny_job(folder / "tag", encoder, "tag", uneven_tags(40)),
        "classify": tiny_job(folder / "classify", encoder, "classify", labelled),
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small only wait for one another's threads on a busy machine."""
    import torch

    torch.set_num_threads(1)


def failures(job: Job, folder: Path, alter: Callable[[CheckContext], CheckContext] = lambda one: one) -> set[str]:
    context = alter(make_context(job, job.model.path, folder))
    return {check.name for check in run_checks(context) if not check.passed}


@pytest.mark.parametrize("name", ["pretrain", "mlm", "tag", "classify"])
def test_the_code_as_it_is_passes(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    assert failures(jobs[name], tmp_path) == set()


Patch = Callable[[pytest.MonkeyPatch], None]


def changing_batches(kind: type, change: Callable[[Batch], Batch]) -> Patch:
    """A collate whose result is spoiled."""
    right = kind.collate  # type: ignore[attr-defined]

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kind, "collate", lambda *arguments: change(right(*arguments)))

    return patch


def with_inputs(batch: Batch, **inputs: Any) -> Batch:
    return replace(batch, inputs={**batch.inputs, **inputs})


def full_mask(batch: Batch) -> Batch:
    return with_inputs(batch, attention_mask=np.ones_like(batch.inputs["input_ids"]))


def running_positions(batch: Batch) -> Batch:
    ids = batch.inputs["input_ids"]
    return with_inputs(batch, position_ids=np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy())


def shifted(batch: Batch) -> Batch:
    return replace(batch, labels=np.concatenate([batch.labels[:, 1:], np.full_like(batch.labels[:, :1], -100)], 1))


def shifted_back(batch: Batch) -> Batch:
    return replace(batch, labels=np.concatenate([np.full_like(batch.labels[:, :1], -100), batch.labels[:, :-1]], 1))


def padding_as_targets(batch: Batch) -> Batch:
    holes = batch.segments < 0 if batch.segments is not None else batch.inputs["attention_mask"] == 0
    return replace(batch, labels=np.where(holes, 0, batch.labels))


def no_targets(batch: Batch) -> Batch:
    return replace(batch, labels=np.full_like(batch.labels, -100))


def with_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalTask, "forward_options", {"use_cache": True})


def mean_of_means(kind: type) -> Patch:
    right = kind.loss_sum  # type: ignore[attr-defined]

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kind, "loss_sum", lambda self, logits, labels: right(self, logits, labels)
                            / max(int((labels != -100).sum()), 1))  # fmt: skip

    return patch


def share(wrong: Callable[[Any, int, int], Any]) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(loop, "share_of_step", wrong)


def rows_as_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretrain, "count_targets", lambda self, table: np.ones(table.num_rows, dtype=np.int64))


def no_target_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    changing_batches(CausalTask, no_targets)(monkeypatch)
    monkeypatch.setattr(Pretrain, "count_targets", lambda self, table: np.zeros(table.num_rows, dtype=np.int64))


def overlapping_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank takes the first rank's sequences."""
    right = StepSource.__init__

    def init(self: Any, shards: Any, packs: Any, order: Any, plan: Any, rank: int, task: Any, pad_id: int) -> None:
        right(self, shards, packs, order, plan, 0, task, pad_id)

    monkeypatch.setattr(StepSource, "__init__", init)


def repeated_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step shows its first sequence twice and leaves its last out."""
    right = Order.step

    def step(self: Any, number: int) -> Any:
        found = right(self, number)
        return np.concatenate([found[:1], found[:-1]])

    monkeypatch.setattr(Order, "step", step)


def rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.write_tensors

    def write(stream: Any, specs: Any, load: Any, metadata: Any) -> Any:
        import torch

        return right(stream, specs, lambda name: load(name).to(torch.bfloat16).float(), metadata)

    monkeypatch.setattr(checks, "write_tensors", write)


def lost_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    right = CausalTask.read

    def read(self: Any, outputs: Any, inputs: Any) -> Any:
        logits = right(self, outputs, inputs)
        return logits * 30 if logits.dtype == torch.bfloat16 else logits

    monkeypatch.setattr(CausalTask, "read", read)


MUTATIONS: dict[str, tuple[str, Patch, str]] = {
    "wrong mask: ones over a pack": ("pretrain", changing_batches(CausalTask, full_mask), "isolation"),
    "wrong mask: a cache is made": ("pretrain", with_cache, "isolation"),
    "wrong mask: padding is seen (tag)": ("tag", changing_batches(Tag, full_mask), "packed_as_separate"),
    "wrong mask: padding is seen (classify)": ("classify", changing_batches(Classify, full_mask), "packed_as_separate"),
    "wrong mask: padding is seen (mlm)": ("mlm", changing_batches(Mlm, full_mask), "packed_as_separate"),
    "wrong position ids: they run on": ("pretrain", changing_batches(CausalTask, running_positions), "isolation"),
    "mean of means (pretrain)": ("pretrain", mean_of_means(CausalTask), "cut_of_step"),
    "mean of means (tag)": ("tag", mean_of_means(Tag), "cut_of_step"),
    "mean of means (mlm)": ("mlm", mean_of_means(Mlm), "cut_of_step"),
    "wrong scale: without the world size": ("pretrain", share(lambda loss, targets, _: loss / targets), "cut_of_step"),
    "wrong scale: a sum, not a mean": ("pretrain", share(lambda loss, targets, world: loss * world), "cut_of_step"),
    "wrong scale: rows counted as targets": ("pretrain", rows_as_targets, "target_share"),
    "shifted labels: one further": ("pretrain", changing_batches(CausalTask, shifted), "model_agrees"),
    "shifted labels: not shifted": ("pretrain", changing_batches(CausalTask, shifted_back), "model_agrees"),
    "double-counted rows: ranks overlap": ("pretrain", overlapping_ranks, "each_row_once"),
    "double-counted rows: a sequence twice": ("tag", repeated_sequences, "each_row_once"),
    "padding is a target (pretrain)": ("pretrain", changing_batches(CausalTask, padding_as_targets), "padding"),
    "padding is a target (tag)": ("tag", changing_batches(Tag, padding_as_targets), "padding"),
    "everything is masked": ("pretrain", no_target_at_all, "target_share"),
    "weights lose bits when saved": ("pretrain", rounded_weights, "reload"),
    "bf16 goes elsewhere": ("pretrain", lost_in_bf16, "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_version_is_caught(
    jobs: dict[str, Job], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, mutate, check = MUTATIONS[name]
    mutate(monkeypatch)
    assert check in failures(jobs[job], tmp_path)


def test_a_result_is_kept_until_something_it_depends_on_changes(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs["pretrain"].model_copy(update={"storage": str(tmp_path)})
    model = find_model(job)
    assert model is not None
    first = verify_job(job, model)
    assert first.passed
    assert len(list((tmp_path / "verify").iterdir())) == 1
    with_cache(monkeypatch)  # would fail now, but nothing that is asked about has changed
    assert verify_job(job, model) == first
    assert not verify_job(job, model, again=True).passed
    eager = job.model_copy(update={"model": job.model.model_copy(update={"attention": "eager"})})
    assert verify_job(eager, model).key != first.key
    assert read_verification(job, model, "cpu") is not None
    assert read_verification(job, model, "NVIDIA H100 80GB HBM3") is None, "a card has kernels of its own"


def test_on_cpus_only_two_layers_of_a_large_model_are_looked_at(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs["pretrain"].model_copy(update={"storage": str(tmp_path)})
    model = find_model(job)
    assert model is not None and verify_job(job, model).layers is None
    monkeypatch.setattr(sample, "WHOLE_BYTES_ON_CPU", 1000)
    found = verify_job(job, model, again=True)
    assert found.passed and found.layers == 2 and found.device == "cpu"


def test_every_kind_of_layer_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth layer is the first that sees the whole sequence."""
    from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig

    folder = small.llama(tmp_path)
    kinds = [*["sliding_attention"] * 3, "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=AutoConfig.from_pretrained(folder).vocab_size, hidden_size=32, intermediate_size=64, head_dim=16,
        num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, layer_types=kinds,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    job = tiny_job(tmp_path / "job", folder, "pretrain", [{"text": "the old dog ran ."}] * 60)
    monkeypatch.setattr(sample, "WHOLE_BYTES_ON_CPU", 1000)
    model = find_model(job)
    assert model is not None
    found = verify_job(job, model)
    assert found.layers == 4, "and not two"
    assert found.passed, found.checks


def test_rows_of_one_label_alone_raise_no_alarm(tmp_path: Path) -> None:
    """As in a file that is sorted by label: the head must not become that of a regression."""
    rows = [{"text": "the old dog ran .", "label": "a"}] * 60 + [{"text": "a red cat sat .", "label": "b"}] * 60
    assert (
        failures(tiny_job(tmp_path / "job", small.bert(tmp_path), "classify", rows[::-1]), tmp_path / "shard") == set()
    )


def test_rows_of_use_are_looked_for_and_longer_ones_taken_where_short_ones_are_of_none(tmp_path: Path) -> None:
    long = "the old dog ran . " * 40
    rows = [{"text": ""}] * 200 + [{"text": long}] * 40
    job = tiny_job(tmp_path / "job", small.llama(tmp_path), "pretrain", rows, data={
        "max_length": 256, "overlong": "drop", "packing": True, "max_drop_fraction": 1.0})  # fmt: skip
    context = make_context(job, job.model.path, tmp_path / "shard")
    assert context.shards.lengths.min() > 128
