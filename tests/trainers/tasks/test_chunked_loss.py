"""The loss over a large vocabulary in chunks: the same loss and gradients, and never all logits at once."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    T5Config,
)

from trainers.tasks import load_task
from trainers.tasks.base import IGNORE
from trainers.tasks.losses import TokenScores, by_line, score_tokens
from trainers.tasks.losses import chunked as chunked_loss
from trainers.tasks.losses.chunked import ChunkedLoss, Teacher, head_loss, head_of
from trainers.training.distill import Distilled, divergence_sum

VOCABULARY, WIDTH, TARGETS = 53, 8, 33


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 positions a chunk, and no vocabulary is too small."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked_loss, "LEAST_VOCABULARY", 1)


def small_model(kind: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 32}  # fmt: skip
    heads = {"num_key_value_heads": 1, "head_dim": 4}
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=1, **more))
    if kind == "gemma2":
        return AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5))
    if kind == "bert":
        return AutoModelForMaskedLM.from_config(BertConfig(**sizes))
    t5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(T5Config(**t5, decoder_start_token_id=0))


def batch_of(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.6, torch.randint(0, VOCABULARY, (3, 20)), IGNORE)
    if kind == "t5":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "target_ids": ids}, labels
    return {"input_ids": ids}, labels


def gradients_of(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def assert_alike(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(smoothing: float, with_teacher: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
    other = torch.nn.Linear(5, VOCABULARY, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(TARGETS, WIDTH, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(TARGETS, 5, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (TARGETS,))
    inputs = [hidden, *layer.parameters()]

    wanted = cross_entropy(layer(hidden), labels, label_smoothing=smoothing, reduction="sum")
    if with_teacher:
        wanted = 0.3 * divergence_sum(layer(hidden), other(seen), 2.0) + 0.7 * wanted
    teacher = Teacher(seen, other.weight, other.bias, 2.0, 0.3) if with_teacher else None
    found = ChunkedLoss.apply(hidden, layer.weight, layer.bias, labels, smoothing, teacher)

    assert float((found - wanted).detach()) == pytest.approx(0.0, abs=1e-10)
    assert_alike(list(torch.autograd.grad(0.7 * found, inputs)), list(torch.autograd.grad(0.7 * wanted, inputs)), 1e-12)


@pytest.mark.parametrize(("kind", "task"), [("llama", "pretrain"), ("bert", "mlm"), ("t5", "seq2seq")])
def test_tasks_over_a_vocabulary_lose_the_same_either_way(
    kind: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (inputs, labels) = small_model(kind).double().eval(), batch_of(kind)
    losses, gradients = [], []
    for least in (1, VOCABULARY + 1):  # in chunks, then all at once
        monkeypatch.setattr(chunked_loss, "LEAST_VOCABULARY", least)
        assert (head_of(model) is None) == (least > VOCABULARY)
        loss = load_task(task).step_loss(model, inputs, labels)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(gradients_of(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_alike(gradients[0], gradients[1], 1e-6)


@pytest.mark.parametrize(("kind", "task"), [("llama", "pretrain"), ("bert", "mlm"), ("t5", "seq2seq")])
def test_tasks_over_a_vocabulary_score_the_same_either_way(
    kind: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and right guesses of each document: inside the output layer, from all logits, and by torch on them."""
    model, (inputs, labels) = small_model(kind).eval(), batch_of(kind)
    lines = by_line(labels.numpy())
    with torch.no_grad():
        answers = load_task(task).answers(model, inputs, labels)
        monkeypatch.setattr(chunked_loss, "LEAST_VOCABULARY", VOCABULARY + 1)
        logits = load_task(task).answers(model, inputs, labels)
    assert isinstance(answers, TokenScores) and logits.shape[-1] == VOCABULARY
    inside, whole = (score_tokens(said, labels.numpy(), lines, 3) for said in (answers, logits))
    for row in range(3):
        wanted = labels[row] != IGNORE
        loss = cross_entropy(logits[row][wanted].double(), labels[row][wanted], reduction="sum")
        right = int((logits[row].argmax(-1) == labels[row])[wanted].sum())
        for numbers in (inside, whole):
            assert numbers["loss_sum"][row] == pytest.approx(float(loss), rel=1e-5)
            assert (numbers["correct"][row], numbers["targets"][row]) == (right, int(wanted.sum()))


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    model, (inputs, labels) = small_model("llama", tie_word_embeddings=False).eval(), batch_of("llama")
    model.lm_head.requires_grad_(False)
    load_task("pretrain").step_loss(model, inputs, labels).backward()
    assert model.lm_head.weight.grad is None
    assert float(model.model.embed_tokens.weight.grad.norm()) > 0


def test_a_model_that_does_more_with_its_logits_keeps_them_whole() -> None:
    """Gemma 2 caps them after the output layer; a loss computed inside would be capped, not the logits."""
    model, (inputs, labels) = small_model("gemma2").eval(), batch_of("gemma2")
    task, head = load_task("pretrain"), head_of(model)
    assert head is not None
    assert head_loss(lambda: task.forward(model, inputs), head, labels, 0.0) is None
    loss = task.step_loss(model, inputs, labels)
    wanted = cross_entropy(model(**inputs).logits[labels != IGNORE], labels[labels != IGNORE], reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    loss.backward()
    assert float(model.lm_head.weight.grad.norm()) > 0
    assert task.answers(model, inputs, labels).shape == (3, 20, VOCABULARY)


def test_distillation_in_chunks_is_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, labels) = small_model("llama").double().eval(), batch_of("llama")
    teacher = small_model("llama", seed=7).double().eval().requires_grad_(False)
    objective = Distilled(load_task("pretrain"), teacher, 2.0, 0.4)
    losses, gradients = [], []
    for least in (1, VOCABULARY + 1):
        monkeypatch.setattr(chunked_loss, "LEAST_VOCABULARY", least)
        loss = objective.step_loss(model, inputs, labels)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(gradients_of(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_alike(gradients[0], gradients[1], 1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize(("least", "chunked"), [(1, True), (4001, False)])
def test_no_operation_makes_all_logits(least: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "LEAST_VOCABULARY", least)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=4000, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    ids = torch.randint(0, 4000, (2, 100))
    task = load_task("pretrain")
    task.step_loss(model, {"input_ids": ids}, ids)  # whether the model caps its logits is asked once
    with LargestTensor() as largest:
        task.step_loss(model, {"input_ids": ids}, ids).backward()
    assert (largest.elements < ids.numel() * 4000) == chunked
    with LargestTensor() as largest, torch.no_grad():
        task.answers(model, {"input_ids": ids}, ids)
    assert (largest.elements < ids.numel() * 4000) == chunked
