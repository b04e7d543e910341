"""Low-rank adapters: put on before training (by peft), merged into plain weights when a checkpoint is exported.

Hu et al. 2021 (arXiv:2106.09685). The head of a task that brings a new one is trained in full. The merge needs only the
checkpoint's tensors, so an export never builds the adapted model.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from trainers.architecture import adaptable_layers, linear_layers, transposed_weights, unread_by_states
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.job.sections import LoraSection
from trainers.pretrained import load_pretrained
from trainers.tasks import Task, load_task, task_options

PREFIX = "base_model.model."
BASE, FACTORS = ".base_layer.", (".lora_A.default.weight", ".lora_B.default.weight")
ALL_LINEAR = ("all-linear",)


def add_adapters(model: Any, lora: LoraSection, task: Task) -> Any:
    """The model with adapters beside its linear layers; everything else but a new head is frozen.

    Raises:
        JobError: where a name of `model.lora.target_modules` matches no layer that can have one.
    """
    from peft import LoraConfig, get_peft_model

    head = new_head(model, task)
    targets = set(_targets(model, lora, head))
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with _names_as_they_are():
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise JobError(f"model.lora.target_modules: {str(error).splitlines()[0]} {_known(model, head)}") from error
    adapters = {name.removeprefix(PREFIX) for name, part in adapted.named_modules() if hasattr(part, "lora_A")}
    assert adapters == targets, sorted(adapters ^ targets)
    for name, parameter in adapted.named_parameters():
        if any(name.startswith(f"{PREFIX}{module}.") for module in head):
            parameter.requires_grad_(True)
    return adapted


def new_head(model: Any, task: Task) -> list[str]:
    """Names of the modules that a task brings new, which train in full."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix] if task.new_head else []


def check_frozen(job: Job, model_path: str) -> None:
    """See that a folder has every weight that adapters leave frozen and the task reads. Headers are read, no weights.

    Raises:
        JobError: where some are missing. They would be drawn at random, and be in no checkpoint and no export.
    """
    import torch
    import transformers

    if job.model.lora is None:
        return
    transformers.logging.set_verbosity_error()
    task, trust = load_task(job.task, task_options(job)), job.model.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(model_path, trust_remote_code=trust)
    auto: Any = getattr(transformers, task.head_class(config))
    if trust or type(config) not in auto._model_mapping:
        return  # a repository's own code may not run without weights: its export is looked at; others load nowhere
    options = {"device_map": "meta", "dtype": getattr(torch, job.model.dtype), "use_safetensors": True}
    model, missing = load_pretrained(auto, model_path, config=config, trust_remote_code=trust, **options)
    if not missing:
        return
    missing -= unread_weights(model, task)
    frozen = (name for name, weight in add_adapters(model, job.model.lora, task).named_parameters()
              if not weight.requires_grad)  # fmt: skip
    if lost := sorted(missing & set(map(plain_name, frozen))):
        raise JobError(
            f"model.lora: {len(lost)} weights that stay frozen are not in {model_path}: {', '.join(lost[:5])}. They "
            "would be drawn at random and never learn: take a folder that has them, or train without model.lora"
        )


def unread_weights(model: Any, task: Task) -> frozenset[str]:
    """Parameters that nothing which the task reads depends on: a task without a head reads a body's last states."""
    return unread_by_states(model) if task.head_class(model.config) == "AutoModel" else frozenset()


def _targets(model: Any, lora: LoraSection, head: list[str]) -> list[str]:
    """Full names of the layers that get adapters."""
    if lora.target_modules == ALL_LINEAR:
        return _of_body(linear_layers(model), head)
    layers = _of_body(adaptable_layers(model), head)
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in lora.target_modules}
    idle = [target for target, names in found.items() if not names]
    if idle:
        raise JobError(f"model.lora.target_modules: {', '.join(idle)} match no linear layer. {_known(model, head)}")
    return [name for names in found.values() for name in names]


def _of_body(names: list[str], head: list[str]) -> list[str]:
    """Without a new head's layers, which train in full."""
    return [name for name in names if name.split(".")[0] not in head]


def _known(model: Any, head: list[str]) -> str:
    names = ", ".join(sorted({name.split(".")[-1] for name in _of_body(linear_layers(model), head)})) or "none"
    return f"This model's linear layers are named {names}; all-linear takes every one"


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """peft 0.21 reads a mixture's `gate_proj`, `up_proj` and `down_proj` as its experts, as they were named before
    transformers 5, also where they are its dense layers and shared experts."""
    from peft.utils import transformers_weight_conversion as conversion

    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


@contextmanager
def merged_adapters(model: Any, lora: LoraSection, read: Callable[[Any], Any]) -> Iterator[None]:
    """Have each adapted layer compute with its weights merged as an export merges them; nothing is written.

    Args:
        model: with adapters; a layer's own weight may be sharded, its hooks gather it.
        read: gives the whole fp32 tensor of a trainable parameter.
    """
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        down, up = (read(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
        layer.base_layer.forward = _merged_forward(layer.base_layer, down, up, lora)
        layer.forward = layer.base_layer.__call__
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward, layer.base_layer.forward


def _merged_forward(layer: Any, down: Any, up: Any, lora: LoraSection) -> Callable[[Any], Any]:
    """A linear layer's forward pass with weight + alpha / rank x up x down."""
    is_transposed = bool(transposed_weights(layer))

    def forward(states: Any) -> Any:
        product = (lora.alpha / lora.rank) * (up @ down)
        weight = (layer.weight.float() + (product.T if is_transposed else product)).to(layer.weight.dtype)
        merged = SimpleNamespace(weight=weight, bias=layer.bias, nf=weight.shape[-1])
        return type(layer).forward(merged, states)

    return forward


def merged_sources(shapes: Iterable[str]) -> dict[str, str]:
    """Names of the merged model's weights, each with the adapted model's for it."""
    return {plain_name(name): name for name in shapes if not name.endswith(FACTORS)}


def is_adapted(source: str) -> bool:
    """Whether an adapted model's weight has factors beside it."""
    return BASE in source and source.endswith(".weight")


def merged_reader(
    shapes: Iterable[str],
    read: Callable[[str], Any],
    lora: LoraSection,
    transposed: AbstractSet[str] = frozenset(),
) -> Callable[[str], Any]:
    """A function that gives any merged weight in fp32.

    Args:
        shapes: names of the adapted model's weights.
        read: gives a tensor of the adapted model by name.
        lora: whose alpha / rank scales the product.
        transposed: merged weights that lie as [in, out]; see `trainers.architecture.transposed_weights`.
    """
    sources = merged_sources(shapes)

    def load(name: str) -> Any:
        source = sources[name]
        weight = read(source)
        if not is_adapted(source):
            return weight
        stem = source[: source.index(BASE)]
        down, up = (read(stem + factor) for factor in FACTORS)
        product = (up @ down).mul_(lora.alpha / lora.rank)
        return (product.T if name in transposed else product).add_(weight)

    return load


def plain_name(name: str) -> str:
    """The name in the model without adapters."""
    return name.removeprefix(PREFIX).replace(BASE, ".")
