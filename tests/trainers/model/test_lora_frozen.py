"""Adapters on a folder that lacks frozen weights are refused before anything is trained."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.planning.preflight import check_job
from tests.tiny import film_rows, make_bert, make_llama, tiny_job
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.model.lora import check_frozen


def with_adapters(job: Job) -> Job:
    return job.model_copy(update={"model": job.model.model_copy(update={"lora": LoraSection(rank=2)})})


def test_frozen_weights_that_a_folder_lacks_refuse_the_job(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", film_rows(20))
    adapted = with_adapters(job)
    check_frozen(adapted, str(model))  # the new head is missing, and is trained
    weights = load_file(model / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "pooler" not in name}, model / "model.safetensors")
    with pytest.raises(
        JobError, match=r"2 weights that stay frozen are not in .*: bert.pooler.dense.bias, .*at random"
    ):
        check_job(adapted)
    check_job(job)  # in full training they are learned


def test_a_causal_model_without_its_output_layer_is_refused(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    for tied in (True, False):
        model = make_llama(tmp_path / str(tied), tiny_chat_tokenizer, tied=tied)
        job = with_adapters(tiny_job(tmp_path, model, "pretrain", film_rows(20)))
        check_frozen(job, str(model))
    weights = load_file(model / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "lm_head" not in name}, model / "model.safetensors")
    with pytest.raises(JobError, match=r"1 weights that stay frozen are not in .*: lm_head.weight"):
        check_frozen(job, str(model))


def test_what_a_task_does_not_read_may_be_missing(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """A similarity of embeddings reads states; a regression over pairs reads the pooler."""
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    weights = load_file(model / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "pooler" not in name}, model / "model.safetensors")
    pairs = [{"sentence1": row["text"], "sentence2": row["text"], "score": 1.0} for row in film_rows(20)]
    jobs = {
        objective: with_adapters(tiny_job(tmp_path, model, "similarity", pairs, train={"objective": objective}))
        for objective in ("cosine", "regression")
    }
    check_frozen(jobs["cosine"], str(model))
    with pytest.raises(JobError, match=r"2 weights that stay frozen are not in .*: bert.pooler.dense.bias"):
        check_frozen(jobs["regression"], str(model))
    save_file({name: weight for name, weight in weights.items() if "layer.1" not in name}, model / "model.safetensors")
    with pytest.raises(JobError, match=r"16 weights that stay frozen are not in .*: encoder.layer.1.attention"):
        check_frozen(jobs["cosine"], str(model))
