"""A teacher teaches labels by their names, whatever their order in its head, and reads the student's tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.preflight import check_job
from tests.tiny import film_rows, make_bert, make_llama, shard_locally, tiny_job
from tests.trainers.evaluation.test_label_order import with_head
from trainers.errors import JobError
from trainers.model.choice import choose
from trainers.model.fit import check_teacher
from trainers.model.memory import StepShape, needs
from trainers.model.model_size import measure_size
from trainers.run.record import find_run
from trainers.training.distill import Distilled, teacher_places, with_teacher

NAMES = ["negative", "positive"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return make_bert(tmp_path_factory.mktemp("base"), tiny_tokenizer, dropout=0.0)


def heads() -> list[list[float]]:
    import torch

    rows: list[list[float]] = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).tolist()
    return rows


def test_the_same_teacher_gives_the_same_loss_in_either_order(base: Path, tmp_path: Path) -> None:
    import torch

    rows = heads()
    teachers = {
        "same": with_head(base, tmp_path / "same", NAMES, rows),
        "flip": with_head(base, tmp_path / "flip", NAMES[::-1], rows[::-1]),
    }
    job = tiny_job(tmp_path, base, "classify", film_rows(20))
    shard_locally(job)
    task = find_run(job).load_task()
    student = task.load_model(str(base), pad_id=0, trust_remote_code=False).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    losses = []
    for folder in teachers.values():
        teacher = task.load_model(str(folder), pad_id=0, trust_remote_code=False).eval()
        places = teacher_places(task, str(folder), str(folder))
        objective = Distilled(task, teacher, 2.0, 1.0, places)
        losses.append(float(objective.step_loss(student, inputs, torch.tensor([0]))))
    assert (
        losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0.1
    )  # kernels round a head of two rows by place


def test_a_teacher_with_other_labels_or_none_is_refused(base: Path, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, base, "classify", film_rows(20))
    shard_locally(job)
    task = find_run(job).load_task()
    other = with_head(base, tmp_path / "other", ["bad", "good"], heads())
    with pytest.raises(JobError, match=r"knows the labels \['bad', 'good'\], the job \['negative', 'positive'\]"):
        teacher_places(task, str(other), "other")
    with pytest.raises(JobError, match="has no head for these labels, so it would answer at random"):
        teacher_places(task, str(base), "base")
    unnamed = with_head(base, tmp_path / "unnamed", ["LABEL_0", "LABEL_1"], heads())
    assert teacher_places(task, str(unnamed), "unnamed") is None


def test_a_teacher_that_reads_other_tokens_or_less_is_refused(
    base: Path, tmp_path: Path, tiny_chat_tokenizer: Path
) -> None:
    model = make_llama(tmp_path / "student", tiny_chat_tokenizer)
    teacher = make_llama(tmp_path / "teacher", tiny_chat_tokenizer, seed=1)

    def taught(by: Path, student: Path, task: str, **data: Any) -> Any:
        distill = {"teacher": str(by)}
        return tiny_job(tmp_path, student, task, film_rows(20), train={"distill": distill}, data=data)

    check_job(taught(teacher, model, "pretrain"))
    file = make_llama(tmp_path / "other", tiny_chat_tokenizer) / "tokenizer.json"
    spec = json.loads(file.read_text())
    first, second = list(spec["model"]["vocab"])[-2:]
    vocab = spec["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(spec))
    with pytest.raises(JobError, match=r"train.distill.teacher: .* other ids for .*must read the same token ids"):
        check_job(taught(file.parent, model, "pretrain"))
    short = with_head(base, tmp_path / "short", NAMES, heads())
    check_job(taught(short, base, "classify"))
    with pytest.raises(JobError, match=r"65 tokens are more than the 64 positions that .*short has learned"):
        check_teacher(taught(short, model, "classify", max_length=65), str(model), str(short))


def test_a_teacher_takes_its_memory_before_the_step_is_cut(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    """Its weights lie whole on every rank, whatever way the student's state is kept."""
    from transformers import AutoModelForCausalLM

    student = make_llama(tmp_path / "student", tiny_chat_tokenizer)
    large = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    teacher = make_llama(tmp_path / "teacher", tiny_chat_tokenizer, **large)
    rows = [{"text": "the plot of the film is good"}] * 8
    train = {"distill": {"teacher": str(teacher)}, "global_batch_size": 64, "micro_batch_size": "auto"}
    job = tiny_job(tmp_path, student, "pretrain", rows, train=train)
    size = measure_size(job, str(student))
    taught = with_teacher(size, job)
    whole = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(teacher).parameters())
    assert taught.teacher_bytes == whole and taught.teacher_passing_bytes > 0
    for alone, beside in zip(needs(size, 2, StepShape(4)), needs(taught, 2, StepShape(4)), strict=True):
        assert beside.device > alone.device + whole

    alone, beside = (choose(job, 1, needs(size, 1, StepShape(16, 4))[0].device, lambda found=each: found)
                     for each in (size, taught))  # fmt: skip
    assert alone.fits and alone.way == "zero0"
    assert beside.way != "zero0" or not beside.fits
