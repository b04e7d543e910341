"""What makes families differ is asked of the model: each property, on a tiny model of a family that has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.architectures.single import Samples, job_of, keeps_apart, kind_of, look_at
from tests.trainers.tasks import small
from trainers.architecture import (
    describe,
    other_modalities,
    packs_as_one_row,
    table_positions,
)
from trainers.architecture.layer_drop import seed_layer_drop
from trainers.errors import JobError
from trainers.job.sections import GenerateSection
from trainers.model.engine import prepare_model
from trainers.tasks import Example, TaskOptions, load_task
from trainers.tasks.generation import generate_texts
from trainers.verification import checks
from trainers.verification.pack_probe import ask
from trainers.verification.packing import PackingDecision, decide_packing, with_packing


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    torch.set_num_threads(1)
    return Samples(tmp_path_factory.mktemp("samples"), "own")


def model_of(family: str, samples: Samples, task: Any) -> Any:
    torch.manual_seed(0)
    return task.load_model(str(samples.model(family)), pad_id=0, trust_remote_code=False, dtype=torch.float32).eval()


def labels() -> Any:
    task = load_task("classify")
    task.labels = ("a", "b", "c")
    return task


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt", "falcon"])
def test_a_head_reads_the_last_token_of_a_row_also_where_that_is_the_padding_id(samples: Samples, family: str) -> None:
    task = labels()
    model = model_of(family, samples, task)
    texts = [[7, 9, 0], [7, 0, 9, 8, 11], [0, 0], [5]]
    rows = [Example(at, np.array(ids, np.int32), {"label": "a"}) for at, ids in enumerate(texts)]

    def logits(chosen: list[Example]) -> torch.Tensor:
        inputs, _ = task.collate([[row] for row in chosen], 0).to("cpu")
        with torch.no_grad():
            return task.forward(model, inputs)

    together, alone = logits(rows), torch.cat([logits([row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    with torch.no_grad():
        states = getattr(model, model.base_model_prefix)(torch.tensor([texts[0]])).last_hidden_state
        score = next(part for name, part in model.named_children() if name != model.base_model_prefix)
        assert torch.allclose(torch.nn.functional.linear(states[0, -1], score.weight), together[0], atol=1e-5)
        plain = model(torch.tensor([[7, 9, 11]])).logits  # a text that does not end with the padding id
    assert torch.allclose(plain, logits([Example(0, np.array([7, 9, 11], np.int32), {"label": "a"})]), atol=1e-5)


def test_a_head_that_reads_the_last_place_gets_the_last_token_as_where_rows_are_padded_on_the_left(
    samples: Samples,
) -> None:
    task = labels()
    model = model_of("xlnet", samples, task)
    texts = [[7, 9, 8], [7, 6, 9, 8, 11]]
    rows = [Example(at, np.array(ids, np.int32), {"label": "a"}) for at, ids in enumerate(texts)]
    inputs, _ = task.collate([[row] for row in rows], 0).to("cpu")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        samples.model("xlnet"), config=model.config
    ).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours = task.forward(model, inputs)
        on_the_left = plain(
            torch.tensor([[0, 0, *texts[0]], texts[1]]), attention_mask=inputs["attention_mask"].flip(1)
        )
        torch.testing.assert_close(ours, on_the_left.logits)
        assert not torch.allclose(ours[0], plain(**inputs).logits[0], atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "roberta", "gpt_oss", "xlnet"])
def test_the_self_tests_raise_no_false_alarm(samples: Samples, family: str) -> None:
    """A head that finds a row's end, a nested configuration, no token types, sinks, padding on the left."""
    packing = keeps_apart(family, samples) if kind_of(family) == "decoder" else None
    for cell in look_at(family, samples, packing):
        assert cell.failed == () and (cell.loss_error or 0.0) <= 1e-5, cell


def test_sizes_stand_in_the_text_configuration(samples: Samples) -> None:
    task = load_task("pretrain")
    model = model_of("gemma3", samples, task)
    shape = describe(model.config)
    assert shape.is_nested and shape.layers == 2 and shape.vocabulary == len(small.WORDS) + 5
    assert shape.kinds_of_layers == ("sliding_attention", "full_attention")
    assert model.config.get_text_config().pad_token_id == 0


def test_what_text_does_not_pass_through_is_frozen(samples: Samples, tmp_path: Path) -> None:
    task = load_task("pretrain")
    model = model_of("gemma3", samples, task)
    job = job_of("pretrain", tmp_path, samples.folder / "models" / "gemma3")
    prepare_model(model, job, task)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all("vision" in name or "multi_modal" in name for name in frozen)
    model(torch.arange(5, 12)[None], use_cache=False).logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen
    assert other_modalities(model_of("llama", samples, task)) == []


def test_layers_are_dropped_alike_on_every_rank_and_in_every_micro_batch(samples: Samples, tmp_path: Path) -> None:
    task = load_task("seq2seq")
    job = job_of("seq2seq", tmp_path, samples.folder / "models" / "m2m_100")
    model = prepare_model(model_of("m2m_100", samples, task), job, task)
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[1, 6]])}
    layers = [part for name, part in model.named_modules() if name.split(".")[-1].isdigit() and "layers" in name]
    run: list[int] = []
    for at, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, at=at: run.append(at))

    def layers_of(step: int, rank: int) -> list[int]:
        run.clear()
        torch.manual_seed(rank)
        seed_layer_drop(model, 0, step)
        model(**ids)
        return list(run)

    by_step = [layers_of(step, 0) for step in range(12)]
    assert by_step == [layers_of(step, 1) for step in range(12)]
    assert by_step[3] == layers_of(3, 0)
    assert 0 < np.mean([len(each) for each in by_step]) < 4 and len({tuple(each) for each in by_step}) > 2
    model.eval()
    assert layers_of(0, 0) == [0, 1, 2, 3]


def test_packing_gives_way_by_itself_where_documents_would_see_each_other(samples: Samples, tmp_path: Path) -> None:
    from trainers.model.source import find_model

    def decide(family: str, **data: Any) -> tuple[Any, PackingDecision | None]:
        model_of(family, samples, load_task("pretrain"))
        job = job_of("pretrain", tmp_path / family, samples.folder / "models" / family)
        job = job.model_copy(update={"data": job.data.model_copy(update={"packing": None, **data})})
        model = find_model(job)
        assert model is not None
        return job, decide_packing(job, model)

    job, decision = decide("llama")
    assert decision is not None and decision.apart and with_packing(job, decision).packing
    for family in ("bloom", "xglm"):
        job, decision = decide(family)
        assert decision is not None and not decision.apart and decision.reason
        assert not with_packing(job, decision).packing and decide(family)[1] == decision
    job, decision = decide("bloom", packing=True)
    assert with_packing(job, decision).packing, "who asks for it gets it, or a refusal"


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "documents"),
        ("opt", "documents"),  # whose masks transformers does not make for packs
        ("mistral", "documents"),  # a sliding window
        ("mixtral", "documents"),  # a router, whose loss wants the mask
        ("llama4_text", "auto"),  # attends in chunks, which no bounds tell
        ("gemma2", "auto"),  # caps its scores
        ("stablelm", "auto"),  # adds the mask itself
        ("lfm2", "documents"),  # carries a state from token to token
        ("mamba2", "documents"),  # does nothing else
        ("gpt_oss", "documents"),  # gives each head a sink
    ],
)
def test_documents_attend_by_bounds_where_that_gives_what_each_alone_gives(
    family: str, attention: str, samples: Samples, tmp_path: Path
) -> None:
    model_of(family, samples, load_task("pretrain"))
    job = job_of("pretrain", tmp_path, samples.folder / "models" / family)
    job = job.model_copy(update={"data": job.data.model_copy(update={"packing": None})})
    decided = with_packing(job, ask(job, job.model.path))
    assert decided.model.attention == attention
    named = job.model_copy(update={"model": job.model.model_copy(update={"attention": "sdpa"})})
    assert with_packing(named, ask(named, named.model.path)).model.attention == "sdpa"
    assert decided.model_copy(update={"data": job.data}).identity() == job.identity()


@pytest.mark.parametrize(("capability", "takes"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_flash_kernel_is_for_cards_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], takes: bool
) -> None:
    from trainers.architecture.document_attention import _flash_takes

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    heads = SimpleNamespace(
        shape=(1, 2, 5, 64), dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda", 1)
    )  # fmt: skip
    assert _flash_takes(heads, heads) is takes


@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 3, 5], dtype=torch.int32)])
def test_what_attention_by_bounds_does_not_compute_is_an_error_and_no_other_result(bounds: Any) -> None:
    from trainers.architecture.document_attention import attend

    states = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="documents does not compute softcap"):
        attend(None, *states, None, cu_seq_lens_q=bounds, max_length_q=5, softcap=2.0)


def test_packs_train_alike_by_bounds_and_by_masks(samples: Samples) -> None:
    """Losses and gradients of a windowed model on padded rows of several documents, some longer than the window."""
    task = load_task("pretrain", TaskOptions(packing=True))
    draw = np.random.default_rng(0)
    rows = [Example(at, draw.integers(5, 30, size).astype(np.int32), {}) for at, size in enumerate((16, 9, 4, 17, 3))]
    inputs, labels = task.collate([rows[:3], rows[3:]], 0).to("cpu")
    assert inputs["bounds"].tolist() == [0, 16, 25, 29, 46, 49, 58]
    model = model_of("mistral", samples, task)
    model.config.sliding_window = 6
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 6
    found = []
    for backend in ("sdpa", "documents"):
        model.set_attn_implementation(backend)
        loss = task.step_loss(model, inputs, labels)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for by_mask, by_bounds in zip(*found, strict=True):
        torch.testing.assert_close(by_bounds, by_mask, rtol=1e-4, atol=1e-5)


def test_packs_go_as_one_row_to_kernels_that_tell_documents_apart_in_a_row_alone(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("pretrain", TaskOptions(packing=True))
    model = model_of("llama", samples, task)
    assert not packs_as_one_row(model)
    draw = np.random.default_rng(0)
    rows = [Example(at, draw.integers(5, 30, size).astype(np.int32), {}) for at, size in enumerate((6, 9, 4, 7, 3))]
    inputs, _ = task.collate([rows[:3], rows[3:]], 0).to("cpu")
    shapes: list[torch.Size] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape),
                                          with_kwargs=True)  # fmt: skip
    with torch.no_grad():
        as_rows = task.forward(model, inputs)
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        assert packs_as_one_row(model)
        monkeypatch.undo()
        monkeypatch.setattr("trainers.tasks.causal.packs_as_one_row", lambda _: True)
        as_one = task.forward(model, inputs)
    assert shapes == [(2, 19), (1, 38)]
    real = inputs["documents"] >= 0
    assert torch.allclose(as_rows[real], as_one[real], atol=1e-5)


def test_the_router_s_loss_counts_where_the_configuration_says_so(samples: Samples) -> None:
    """Padding is not in it, and packing does not change it."""
    task = load_task("pretrain", TaskOptions(packing=True))
    model = model_of("mixtral", samples, task)
    assert describe(model.config).router_loss == pytest.approx(0.02)
    rows = [Example(at, np.arange(5, 5 + size, dtype=np.int32), {}) for at, size in enumerate((6, 9, 4))]
    for packs in ([rows], [[row] for row in rows]):
        inputs, labels = task.collate(packs, 0).to("cpu")
        with torch.no_grad():
            extra = task.step_loss(model, inputs, labels) - task.loss_sum(task.forward(model, inputs), labels)
            alone = model(torch.cat([torch.from_numpy(row.input_ids) for row in rows])[None].long(),
                          position_ids=torch.cat([torch.arange(len(row.input_ids)) for row in rows])[None],
                          use_cache=False)  # fmt: skip
        targets = int((labels != -100).sum())
        assert float(extra) == pytest.approx(0.02 * float(alone.aux_loss) * targets, rel=1e-3)


def test_a_second_look_that_is_not_to_be_had_is_no_finding_and_hides_none(samples: Samples) -> None:
    context = samples.get("decoder", "pretrain", False)
    first: dict[str, float] = {}

    def measure(result: Any) -> Any:
        def look(context: Any) -> tuple[float, str]:
            if context.model.dtype == torch.float64:
                if isinstance(result, Exception):
                    raise result
                return float(result), "again"
            return first["error"], "once"

        return checks.with_second_look(look)

    no_kernel = RuntimeError("Expected mat_a to be Float32, got Double")
    for error, second, passes in (
        (1e-6, no_kernel, True), (1e-4, no_kernel, True), (1e-2, no_kernel, False), (1e-4, float("nan"), True),
        (1e-2, float("nan"), False), (1e-2, 1e-9, True), (1e-4, 1e-4, False), (float("nan"), float("nan"), False),
    ):  # fmt: skip
        first["error"] = error
        passed, detail = measure(second)(context)
        assert passed == passes, (error, second, detail)
    assert context.model.dtype == torch.float32


def test_the_router_s_loss_counts_beside_a_teacher_too(samples: Samples) -> None:
    from trainers.training.distill import Distilled

    task = load_task("pretrain", TaskOptions(packing=True))
    model = model_of("mixtral", samples, task)
    rows = [Example(at, np.arange(5, 5 + size, dtype=np.int32), {}) for at, size in enumerate((6, 9, 4))]
    inputs, labels = task.collate([rows], 0).to("cpu")
    with torch.no_grad():  # a teacher of no weight
        beside = Distilled(task, model, 1.0, 0.0).step_loss(model, inputs, labels)
        alone, bare = task.step_loss(model, inputs, labels), task.loss_sum(task.forward(model, inputs), labels)
    assert float(beside) == pytest.approx(float(alone), rel=1e-6)
    assert float(alone) > float(bare)


def test_a_task_that_a_family_has_no_head_for_is_refused_by_name(samples: Samples) -> None:
    task = load_task("extract")
    with pytest.raises(JobError, match="no QuestionAnswering head for a gemma model"):
        model_of("gemma", samples, task)


@pytest.mark.parametrize(
    "family, positions",
    [("opt", 128), ("gpt2", 128), ("gptj", 128), ("bart", 128), ("pegasus", 128), ("roberta", None), ("llama", None)],
)
def test_texts_are_generated_as_far_as_there_are_positions(
    samples: Samples, family: str, positions: int | None
) -> None:
    """A table of positions may begin at an offset, or after the padding id; rotary ones go on."""
    task = load_task("mlm" if family == "roberta" else "seq2seq" if kind_of(family) == "pair" else "pretrain")
    model = model_of(family, samples, task)
    if family == "roberta":  # 132 rows
        assert table_positions(model) == 131 - model.config.pad_token_id
        return
    assert table_positions(model) == positions
    model.generation_config.eos_token_id = -1
    settings = GenerateSection(max_new_tokens=150, num_beams=1).model_dump()
    prompts = [np.full(length, 7, np.int32) for length in (3, 120)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(samples.folder / "models" / family)
    said = generate_texts(model, prompts, tokenizer, 0, settings, [0])
    assert len(said) == 2


def test_a_head_that_drops_at_a_rate_of_its_own_takes_the_jobs(samples: Samples) -> None:
    """Gemma's configuration has one rate, that of attention, and its head for words another; MPT's has its own inside
    another configuration, and takes whole numbers alone."""

    def rates(family: str, rate: float) -> set[float]:
        task = load_task("tag", TaskOptions(dropout=rate))
        task.labels = ("O", "B-a")
        return {part.p for part in model_of(family, samples, task).modules() if isinstance(part, torch.nn.Dropout)}

    assert (rates("gemma", 0.25), rates("bert", 0.25), rates("mpt", 0.0)) == ({0.25}, {0.25}, {0.0})
    with pytest.raises(JobError, match=r"mpt takes no 0.25 as its attn_pdrop"):
        rates("mpt", 0.25)
