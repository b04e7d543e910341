"""Activation checkpointing: the same gradients bit for bit, from less that is kept."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config, LlamaConfig, T5Config
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.model.activations import checkpoint_activations
from trainers.model.engine import build_engine
from trainers.model.world import World
from trainers.tasks import load_task

LAYERS = 8
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=0.1))
    if kind == "bert":
        return AutoModelForMaskedLM.from_config(BertConfig(**SIZES))
    if kind == "gpt2":
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=LAYERS, n_head=2))
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=2, decoder_start_token_id=0)
    return Seq2Seq.from_config(t5)


def step(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a step with dropout, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    ids = torch.randint(0, 50, (4, 64))
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        labels = {"labels": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"labels": ids}
        loss = model(input_ids=ids, use_cache=False, **labels).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_the_same_bits(kind: str, every: int) -> None:
    wanted, whole = step(make(kind))
    model = make(kind)
    checkpoint_activations(model, every, offload=False)
    found, kept = step(model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []
    assert kept < whole


def test_full_keeps_less_than_every_third_and_that_less_than_none() -> None:
    kept = []
    for every in (0, 3, 1):
        model = make("llama")
        if every:
            checkpoint_activations(model, every, offload=False)
        kept.append(step(model)[1])
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] <= kept[0] / 4


@pytest.mark.parametrize("frozen", ["embeddings", "all but the head"])
def test_frozen_parts_stay_without_gradients(frozen: str) -> None:
    model = make("llama")
    part = model.model.embed_tokens if frozen == "embeddings" else model.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    part.requires_grad_(False)
    checkpoint_activations(model, 1, offload=False)
    found, _ = step(model)
    assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_a_model_that_cannot_is_a_clear_error() -> None:
    model = make("llama")
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(JobError, match=r"activation_checkpointing: LlamaForCausalLM does not support it"):
            checkpoint_activations(model, 1, offload=False)
    finally:
        del type(model).supports_gradient_checkpointing


def test_the_job_names_what_is_wrong_and_stays_the_same_run() -> None:
    raw: dict[str, Any] = {
        "name": "n", "task": "pretrain", "model": {"path": "m"}, "data": {"train": ["t"], "eval": ["e"]},
        "train": {"global_batch_size": 1, "steps": 1, "learning_rate": 1e-3}, "storage": "s",
    }  # fmt: skip
    plain = parse_job(raw)
    for wish, every in (("none", 0), ("full", 1), (4, 4)):
        job = parse_job({**raw, "train": {**raw["train"], "activation_checkpointing": wish}})
        assert job.train.checkpoint_every_layers == every
        assert job.identity() == plain.identity()
    with pytest.raises(JobError, match=r"activation_offload: needs train.activation_checkpointing"):
        parse_job({**raw, "train": {**raw["train"], "activation_checkpointing": "none", "activation_offload": True}})
    raw["train"]["activation_offload"] = True
    with pytest.raises(JobError, match=r"activation_offload: without GPUs .* leave it out"):
        parse_job({**raw, "scale": {"gpus_per_worker": 0}})
    ranks = World(0, 1, torch.device("cpu"))
    with pytest.raises(JobError, match=r"activation_offload: ranks compute on CPUs"):
        build_engine(parse_job(raw), load_task("pretrain"), "no-folder", 0, {}, ranks)
