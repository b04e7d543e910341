"""What a job can ask for in any task: adapters, teachers, noise, decay by layer, smoothing, weights, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import shard_locally, tiny_job
from tests.trainers.tasks import small
from tests.trainers.tasks.test_every_task import export, held_out
from tests.trainers.training.test_training import train_all
from trainers.architecture import set_dropout
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.job.sections import LoraSection
from trainers.model.engine import add_embedding_noise, freeze
from trainers.model.param_groups import layer_depths, parameter_groups
from trainers.tasks import TaskOptions, load_task
from trainers.tasks.classify import class_weights
from trainers.tasks.losses import cross_entropy_sum
from trainers.tasks.options import read_template
from trainers.training.distill import Distilled, divergence_sum


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"bert": small.bert(folder / "bert"), "llama": small.llama(folder / "llama")}


def job(folder: Path, model: Path, task: str, rows: list[dict[str, Any]], lora: Any = None, **sections: Any) -> Any:
    train = {"steps": 20, "learning_rate": 5e-3, **sections.pop("train", {})}
    made = tiny_job(folder, model, task, rows, train=train, checkpoint={"every_steps": 10}, **sections)
    shard_locally(made)
    return made.model_copy(update={"model": made.model.model_copy(update={"lora": lora})})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Any]:
    """Jobs with their losses, all from one launch of two ranks; "lora resumed" goes on from step 10."""
    folder = tmp_path_factory.mktemp("options")
    rows, texts = small.tag_rows(60), small.plain_rows(60)
    adapters = LoraSection(rank=4, alpha=8.0)
    jobs = {
        "lora": job(folder / "lora", models["bert"], "tag", rows, lora=adapters),
        "lora causal": job(folder / "causal", models["llama"], "pretrain", texts, lora=adapters),
        "everything": job(
            folder / "all", models["llama"], "pretrain", texts,
            train={"neftune_alpha": 5.0, "layer_decay": 0.8, "label_smoothing": 0.1,
                   "distill": {"teacher": str(models["llama"]), "alpha": 0.2}},
        ),
    }  # fmt: skip
    plan = [(jobs["lora"], "run", None), (jobs["lora"], "again", 10), (jobs["lora"], "again", None)]
    plan += [(one, "run", None) for name, one in jobs.items() if name != "lora"]
    losses = run_ranks(train_all, 2, plan)[0]
    names = ["lora", "lora stopped", "lora resumed", *list(jobs)[1:]]
    return {"jobs": jobs, "losses": dict(zip(names, losses, strict=True))}


@pytest.mark.slow
def test_adapters_train_resume_exactly_and_leave_the_rest(trained: dict[str, Any]) -> None:
    losses = trained["losses"]
    assert losses["lora"][20] < 0.7 * losses["lora"][1]
    assert losses["lora stopped"] | losses["lora resumed"] == losses["lora"]
    assert losses["everything"][20] < losses["everything"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lora causal"])
def test_export_merges_adapters_as_peft_does(trained: dict[str, Any], name: str, tmp_path: Path) -> None:
    from trainers.checkpoint.local_copies import LocalCopies
    from trainers.checkpoint.reading import CheckpointReader
    from trainers.model.lora import add_adapters
    from trainers.run.folder import step_name
    from trainers.storage import Folder

    one = trained["jobs"][name]
    task, _ = held_out(one)
    merged = task.load_model(export(one), pad_id=0, trust_remote_code=False).eval()
    assert not any("lora" in key for key in merged.state_dict())
    base = task.load_model(one.model.path, pad_id=0, trust_remote_code=False)
    adapted = add_adapters(base, one.model.lora, task).eval()
    reader = CheckpointReader(LocalCopies(Folder(one.storage) / "runs" / "run" / "checkpoints" / step_name(20)))
    shapes = reader.state.shapes
    held = {key: shape for key, shape in shapes.items() if reader.holds("weight", key)}
    assert held.keys() == set(reader.state.trainable) < shapes.keys(), "what stays the pretrained model is not saved"
    saved = {key: reader.read("weight", key, 0, int(np.prod(shape))).view(shape) for key, shape in held.items()}
    assert adapted.load_state_dict(saved, strict=False).unexpected_keys == []
    ids = torch.randint(5, 20, (3, 9))
    before = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, before, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, merged(input_ids=ids).logits,
                               atol=2e-5, rtol=1e-5)  # fmt: skip


def test_adapters_on_layers_that_do_not_exist_are_refused(models: dict[str, Path]) -> None:
    from trainers.model.lora import add_adapters

    task = load_task("pretrain")
    model = task.load_model(str(models["llama"]), pad_id=0, trust_remote_code=False)
    with pytest.raises(JobError, match="target_modules"):
        add_adapters(model, LoraSection(target_modules=("qproj",)), task)


def test_a_teacher_pulls_towards_its_distribution() -> None:
    logits, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    found = divergence_sum(logits, teacher, 2.0)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(logits / 2, -1)
    assert float(found) == pytest.approx(float(4 * (p * (p / q).log()).sum()))
    assert float(divergence_sum(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-12)


def test_a_teacher_attends_as_its_own_architecture_does(tmp_path: Path, models: dict[str, Path]) -> None:
    from trainers.model.world import World
    from trainers.training.distill import load_objective

    rows, teacher = [{"text": "the film is good ."}] * 10, str(models["llama"])
    job = tiny_job(tmp_path, models["llama"], "pretrain", rows, train={"distill": {"teacher": teacher}})
    job = job.model_copy(update={"model": job.model.model_copy(update={"attention": "documents"})})
    objective = load_objective(job, load_task("pretrain"), 0, World(0, 1, torch.device("cpu")))
    assert isinstance(objective, Distilled)
    assert objective._teacher.config._attn_implementation == "sdpa"


def test_a_teacher_of_another_size_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    task = load_task("classify")
    task.labels = ("a", "b")
    student = task.load_model(str(models["bert"]), pad_id=0, trust_remote_code=False)
    task.labels = ("a", "b", "c")
    teacher = task.load_model(str(models["bert"]), pad_id=0, trust_remote_code=False)
    ids = {"input_ids": torch.randint(5, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with pytest.raises(JobError, match="3 outputs, the model 2"):
        Distilled(task, teacher, 1.0, 0.5).step_loss(student, ids, torch.tensor([0, 1]))


def test_noise_stands_on_embeddings_only_while_training(models: dict[str, Path]) -> None:
    model = load_task("pretrain").load_model(str(models["llama"]), pad_id=0, trust_remote_code=False)
    ids = torch.randint(5, 20, (2, 16))
    plain = model.get_input_embeddings()(ids)
    add_embedding_noise(model, 5.0)
    model.eval()
    assert model.get_input_embeddings()(ids).equal(plain)
    model.train()
    noise = (model.get_input_embeddings()(ids) - plain).abs()
    bound = 5.0 / (16 * plain.shape[-1]) ** 0.5
    assert 0.5 * bound < float(noise.max().detach()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_each_layer_learns_at_a_share_of_the_layer_above(models: dict[str, Path], kind: str) -> None:
    task = load_task("classify")
    task.labels = ("a", "b")
    model = task.load_model(str(models[kind]), pad_id=0, trust_remote_code=False)
    depths = layer_depths(model)
    of = dict(depths)
    head = "classifier.weight" if kind == "bert" else "score.weight"
    stack = "bert.encoder.layer" if kind == "bert" else "model.layers"
    embedding = "bert.embeddings.word_embeddings.weight" if kind == "bert" else "model.embed_tokens.weight"
    layers = [{of[name] for name in of if name.startswith(f"{stack}.{number}.")} for number in (0, 1)]
    assert (of[head], layers[1], layers[0], of[embedding]) == (0, {1}, {2}, 3)
    scales = {group["lr_scale"] for group in parameter_groups(model, 0.01, 0.5)}
    assert scales == {1.0, 0.5, 0.25, 0.125}
    covered = [id(p) for group in parameter_groups(model, 0.01, 0.5) for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())


def test_biases_and_norms_do_not_decay(models: dict[str, Path]) -> None:
    model = load_task("mlm").load_model(str(models["bert"]), pad_id=0, trust_remote_code=False)
    for group in parameter_groups(model, 0.1):
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    assert {group["lr_scale"] for group in parameter_groups(model, 0.1)} == {1.0}


def test_a_groups_share_scales_the_rate() -> None:
    from types import SimpleNamespace

    from trainers.training.loop import set_learning_rate

    groups: list[dict[str, float]] = [{"lr": 0.0, "lr_scale": 0.5}, {"lr": 0.0}]
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 0.1)
    assert [group["lr"] for group in groups] == [0.05, 0.1]


def test_smoothing_spreads_the_target() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])
    logs = torch.log_softmax(logits[:5], -1)
    wanted = -(0.9 * logs.diagonal().sum() + 0.1 * logs.mean(-1).sum())
    assert float(cross_entropy_sum(logits, labels, 0.1)) == pytest.approx(float(wanted), rel=1e-5)


def test_class_weights_scale_each_label() -> None:
    assert class_weights("balanced", {"a": 30, "b": 10}, 40, ("a", "b")) == [pytest.approx(2 / 3), 2.0]
    assert class_weights("balanced", {"a": 30, "b": 10}, 40, ("a", "of the head", "b")) == [
        pytest.approx(2 / 3),
        1.0,
        2,
    ]
    assert class_weights("balanced", {"a": 50, "b": 50}, 1000, ("a", "b")) == [10.0, 10.0]
    assert class_weights({"b": 3.0}, {}, 0, ("a", "b")) == [1.0, 3.0]
    with pytest.raises(JobError, match="'c'"):
        class_weights({"c": 1.0}, {}, 0, ("a", "b"))
    task = load_task("classify", TaskOptions(class_weights={"b": 3.0}))
    task.labels = ("a", "b")
    logits = torch.randn(2, 2)
    each = [torch.nn.functional.cross_entropy(logits[i : i + 1], torch.tensor([i])) for i in (0, 1)]
    assert float(task.loss_sum(logits, torch.tensor([0, 1]))) == pytest.approx(float(each[0] + 3 * each[1]), rel=1e-5)


def test_dropout_is_set_throughout_and_refused_where_there_is_none(models: dict[str, Path]) -> None:
    from transformers import AutoConfig

    model = load_task("mlm", TaskOptions(dropout=0.33)).load_model(
        str(models["bert"]), pad_id=0, trust_remote_code=False
    )
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.33}
    config = AutoConfig.from_pretrained(models["bert"])
    for name in [key for key in config.to_dict() if "dropout" in key]:
        delattr(config, name) if name in config.__dict__ else None
    with pytest.raises(JobError, match="no dropout rate"):
        set_dropout(config, 0.1)


def test_freezing_the_backbone_leaves_the_head(models: dict[str, Path]) -> None:
    task = load_task("classify")
    task.labels = ("a", "b")
    model = task.load_model(str(models["bert"]), pad_id=0, trust_remote_code=False)
    freeze(model, ["bert.*"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


GOOD: dict[str, Any] = {
    "name": "x", "task": "classify", "model": {"path": "org/model"},
    "data": {"train": ["a.jsonl"], "eval": ["b.jsonl"]},
    "train": {"global_batch_size": 8, "steps": 5, "learning_rate": 1e-4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "section", "key", "value", "said"),
    [
        ("sft", "data", "multi_label", True, "data.multi_label: means nothing to task sft"),
        ("classify", "train", "mask", {"fraction": 0.3}, "train.mask: means nothing to task classify"),
        ("tag", "evaluate", "generate", {"num_beams": 2}, "evaluate.generate: means nothing to task tag"),
        ("extract", "train", "distill", {"teacher": "org/t"}, "train.distill: means nothing to task extract"),
        ("similarity", "data", "score_range", [5, 0], "data.score_range: must be"),
        ("seq2seq", "data", "prompt", "translate", "data.prompt: must hold {source} once"),
        ("seq2seq", "data", "prompt", "{source} in {language}", "did you mean 'target_language'?"),
        ("extract", "data", "overlong", "truncate", "data.overlong: extract reads long contexts in windows"),
        ("tag", "data", "packing", True, "data.packing: tag reads one row a sequence"),
        ("classify", "train", "class_weights", {"a": "x"}, "train.class_weights"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(task: str, section: str, key: str, value: Any, said: str) -> None:
    raw = {**GOOD, "task": task, section: {**GOOD.get(section, {}), key: value}}
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("task", ["mlm", "tag", "extract", "seq2seq", "similarity", "classify", "sft", "pretrain"])
def test_a_resolved_job_reads_back_as_itself(task: str) -> None:
    read = parse_job({**GOOD, "task": task})
    assert parse_job(read.model_dump(mode="json")) == read


def test_a_chat_template_that_is_only_a_name_is_refused() -> None:
    with pytest.raises(JobError, match=r"data.chat_template: 'chatml' is no template .* ends in .jinja"):
        read_template("chatml")
    assert read_template("{{ messages }}") == "{{ messages }}"


def test_balanced_weights_are_told_of_the_rows_not_of_their_labels(models: dict[str, Path], tmp_path: Path) -> None:
    from trainers.run.record import job_task

    rows = [{"text": "the dog ran", "label": ["a", "b"] if index % 10 == 0 else []} for index in range(50)]
    job = tiny_job(tmp_path, models["bert"], "classify", rows, data={"multi_label": True},
                   train={"class_weights": "balanced"})  # fmt: skip
    task = job_task(job, shard_locally(job).train)
    assert task._weights(torch.zeros(1, 2)).tolist() == [5.0, 5.0]  # type: ignore[attr-defined]
