"""A model whose packed documents see each other is told from one whose documents do not, by its own logits."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_bert, make_llama
from trainers.batching.packing import PackIndex
from trainers.errors import TrainingError
from trainers.tasks import Example, load_task
from trainers.tasks.base import Batch
from trainers.tasks.pretrain import Pretrain
from trainers.verification.isolation import check_isolation, logit_change

ROWS = [Example(index, np.arange(5, 5 + length, dtype=np.int32), {}) for index, length in enumerate((6, 9, 4, 7))]


PACKS = PackIndex(np.array([0, 2, 4]), np.arange(4))


class FewRows:
    """A split of four documents."""

    lengths = np.array([len(row.input_ids) for row in ROWS], np.int32)

    def __len__(self) -> int:
        return len(ROWS)

    def row(self, index: int) -> Example:
        return ROWS[index]


class Cached(Pretrain):
    forward_options = MappingProxyType({"use_cache": True})


class Masked(Pretrain):
    """Also hands over the usual mask of ones."""

    def collate(self, packs: Any, pad_id: int, draw: int = 0) -> Batch:
        batch = super().collate(packs, pad_id)
        batch.inputs["attention_mask"] = np.ones_like(batch.inputs["input_ids"])
        return batch


class EncodedRow(Pretrain):
    """An encoder's packing: position ids and a 4-D mask of blocks."""

    forward_options = MappingProxyType({})

    def collate(self, packs: Any, pad_id: int, draw: int = 0) -> Batch:
        batch = super().collate(packs, pad_id)
        assert batch.segments is not None
        batch.inputs["attention_mask"] = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
        return batch


def check(model: Any, task: Any) -> None:
    model.train()
    check_isolation(model, task, FewRows(), PACKS, 2, 0, "sdpa", torch.device("cpu"))  # type: ignore[arg-type]
    assert model.training


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_llama(tmp_path_factory.mktemp("llama"), tiny_chat_tokenizer))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"), tiny_chat_tokenizer)


class Across(torch.nn.Module):
    """A model whose rows see each other where there are several, as kernels for one row make it of flat batches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        outputs.logits = outputs.logits + 0.1 * outputs.logits.flip(0)
        return outputs


def test_a_leak_that_only_the_micro_batch_of_the_training_has_is_found(llama: Any) -> None:
    task, device = load_task("pretrain"), torch.device("cpu")
    model = Across(llama)
    check_isolation(model, task, FewRows(), PACKS, 1, 0, "sdpa", device)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="packed documents see each other"):
        check_isolation(model, task, FewRows(), PACKS, 2, 0, "sdpa", device)  # type: ignore[arg-type]


def test_no_logits_are_made_where_the_vocabulary_is_large(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.tasks.losses.chunked.LEAST_VOCABULARY", 1)
    monkeypatch.setattr("trainers.verification.isolation.logits_of", None)
    check(llama, load_task("pretrain"))
    with pytest.raises(TrainingError, match="packed documents see each other"):
        check(llama, Cached())


def test_documents_of_the_causal_tasks_are_apart(llama: Any) -> None:
    check(llama, load_task("pretrain"))
    llama.set_attn_implementation("eager")
    check(llama, load_task("pretrain"))
    llama.set_attn_implementation("sdpa")


@pytest.mark.parametrize("task", [Cached, Masked])
def test_a_cache_or_a_mask_of_ones_is_caught(llama: Any, task: type[Pretrain]) -> None:
    with pytest.raises(TrainingError, match=r"packed documents see each other.*model\.attention: sdpa"):
        check(llama, task())


def test_an_encoder_is_apart_under_sdpa_and_caught_where_it_leaks(bert: Path) -> None:
    from transformers import AutoModelForMaskedLM

    check(AutoModelForMaskedLM.from_pretrained(bert, attn_implementation="sdpa"), EncodedRow())
    for backend, task in (("eager", EncodedRow()), ("sdpa", Masked())):
        model = AutoModelForMaskedLM.from_pretrained(bert, attn_implementation=backend)
        with pytest.raises(TrainingError, match="packed documents see each other"):
            check(model, task)


def test_the_change_is_measured_on_the_other_documents_alone() -> None:
    def seen_by_all(batch: Batch) -> torch.Tensor:
        ids = torch.from_numpy(batch.inputs["input_ids"])
        return ids.sum().expand(*ids.shape, 2).float()

    def seen_by_itself(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(batch.inputs["input_ids"])[..., None].expand(-1, -1, 2).float()

    task = load_task("pretrain")
    for packs in ([ROWS], [[row] for row in ROWS]):  # in one sequence, and in one batch
        assert logit_change(seen_by_itself, task, packs, 0, 0) == (0, 3)
        assert logit_change(seen_by_all, task, packs, 0, 0)[0] > 0


def _under_zero3(model_path: str) -> list[str]:
    """Both verdicts from inside a partitioned engine."""
    from trainers.batching.batch_plan import plan_batches
    from trainers.job.load import parse_job
    from trainers.model.deepspeed_config import derive_config
    from trainers.model.engine import build_engine
    from trainers.model.world import join_world

    plain = {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4, "deepspeed": "zero3"}
    data = {"train": ["x.txt"], "eval": ["x.txt"]}
    model = {"path": model_path, "dtype": "float32"}
    job = parse_job({"name": "t", "task": "pretrain", "model": model, "data": data, "train": plain})
    world = join_world(1)
    plan = plan_batches(2, "auto", world.size, 64)
    engine = build_engine(job, load_task("pretrain"), model_path, 0, derive_config(job, plan), world)
    found = []
    for task in (load_task("pretrain"), Masked()):
        try:
            check_isolation(engine, task, FewRows(), PACKS, 2, 0, "auto", world.device)  # type: ignore[arg-type]
            found.append("apart")
        except TrainingError:
            found.append("refused")
    ids = torch.ones((1, 8), dtype=torch.long)
    engine.backward(engine(input_ids=ids, labels=ids).loss)  # a step still works afterwards
    engine.step()
    return found


@pytest.mark.cluster
def test_the_check_runs_in_a_partitioned_engine(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    path = make_llama(tmp_path / "llama", tiny_chat_tokenizer)
    assert run_ranks(_under_zero3, 2, str(path)) == [["apart", "refused"]] * 2
