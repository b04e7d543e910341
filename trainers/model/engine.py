"""Builds the DeepSpeed engine: model, frozen parameters, optimizer, ZeRO partitioning, in that order."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

from trainers.architecture import DOCUMENTS, makes_weights, other_modalities
from trainers.architecture.layer_drop import share_layer_drop
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.activations import checkpoint_activations
from trainers.model.lora import add_adapters
from trainers.model.param_groups import parameter_groups
from trainers.model.tiles import tile_feed_forward, tiled_layers
from trainers.model.world import World
from trainers.model.zero_passes import forget
from trainers.model.zero_settings import mark_experts, with_settings
from trainers.tasks import Task

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def build_engine(job: Job, task: Task, model_path: str, pad_id: int, config: dict[str, Any], world: World) -> Any:
    """The engine of this rank: DeepSpeed's, or a plain one at stage 0. Under ZeRO-3 no rank ever holds the whole model,
    but for families that make weights while they load, which they cannot do from a part.

    Args:
        model_path: folder with config.json and safetensors.
        config: what `derive_config` made.

    Raises:
        JobError: where activations should leave a device that is none.
    """
    import torch

    if job.train.activation_offload and world.device.type == "cpu":
        raise JobError(
            "train.activation_offload: ranks compute on CPUs, whose activations lie in host memory; leave it out"
        )

    stage = config["zero_optimization"]["stage"]
    if stage:
        _init_deepspeed()
    whole = stage < 3 or makes_weights(task.model_class(model_path, pad_id, job.model.trust_remote_code))
    torch.manual_seed(job.train.seed)  # a new head is initialized alike at any world size
    with nullcontext() if whole else partitioned_on_load(config):
        model = prepare_model(task.load_model(model_path, pad_id=pad_id, **load_options(job)), job, task)
    if not stage:
        model.to(world.device)
    groups = parameter_groups(model, job.train.weight_decay, job.train.layer_decay)
    settings = {"lr": job.train.learning_rate, "betas": ADAM_BETAS, "eps": ADAM_EPS, "fused": True}
    if not stage:
        from trainers.model.plain_engine import PlainEngine

        return PlainEngine(model, groups, settings, config)
    import deepspeed

    mark_experts(config, model)
    if stage == 3:
        for layer in tiled_layers(model):  # its weights stay from the first tile to the last
            deepspeed.utils.set_z3_leaf_module(layer, True)
    config = with_settings(config, model, world.size)
    optimizer = torch.optim.AdamW(groups, **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


@contextmanager
def partitioned_on_load(config: dict[str, Any]) -> Iterator[None]:
    """What transformers loads meanwhile is partitioned; what is loaded later (a teacher, an export) is whole."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)  # transformers keeps only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _init_deepspeed() -> None:
    import_deepspeed()
    import deepspeed

    # DeepSpeed's all-reduce over shared memory is compiled at first use and waits for ever on a peer that died. Nothing
    # else is looked up in this table, and one that is there spares each rank the compilers that fill it
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":  # else it asks `numactl` at each step: 2.8 ms
        os.environ.setdefault("LOCAL_SIZE", str(accelerator.device_count()))
        deepspeed.utils.nvtx.enable_nvtx = False  # 800 ranges a step that nothing on a CPU shows
    deepspeed.init_distributed(verbose=False)  # finds the process group that join_world made


def import_deepspeed() -> None:
    """DeepSpeed without two things that it imports and no job needs: MLflow for its autotuner, 2 s of CPU, and torch's
    code generator, 1.5 s, to have its Muon compiled where it looks whether an optimizer is one."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        from deepspeed.runtime import compiler
    finally:
        if hidden:
            del sys.modules["mlflow"]
    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = before


def release_engine(engine: Any) -> None:
    """End an engine, so that its memory comes free with the last reference to it.

    DeepSpeed 0.19 keeps ZeRO-3's model in two places that outlive it: a stack of modules, and a cache of a method.
    """
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import parameter_offload

        parameter_offload.FWD_MODULE_STACK.clear()
        forget()


def prepare_model(model: Any, job: Job, task: Task) -> Any:
    """What the job changes in a loaded model before it trains: frozen parts, adapters, noise, activations."""
    freeze(model, job.model.freeze)
    freeze_other_modalities(model)
    share_layer_drop(model)
    if job.train.feed_forward_tiles is True:
        tile_feed_forward(model)
    if job.model.lora is not None:
        model = add_adapters(model, job.model.lora, task)
    if job.train.neftune_alpha:
        add_embedding_noise(model, job.train.neftune_alpha)
    if every := job.train.checkpoint_every_layers:
        checkpoint_activations(model, every, job.train.activation_offload)
    model.train()
    return model


def freeze_other_modalities(model: Any) -> None:
    """What text does not pass through has no gradient, but would decay."""
    for name in other_modalities(model):
        model.get_parameter(name).requires_grad_(False)


def load_options(job: Job) -> dict[str, Any]:
    """Arguments of from_pretrained that the job decides."""
    import torch

    options: dict[str, Any] = {
        "dtype": getattr(torch, job.model.dtype),
        "use_safetensors": True,
        "trust_remote_code": job.model.trust_remote_code,
    }
    if job.model.attention == DOCUMENTS:
        import trainers.architecture.document_attention  # noqa: F401  # known to transformers from then on
    if job.model.attention != "auto":
        options["attn_implementation"] = job.model.attention
    return options


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Turn off gradients of the parameters whose names match.

    Raises:
        JobError: where a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise JobError(f"model.freeze: {idle} match no parameter; names look like {names[:3]} ... {names[-2:]}")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):  # sinusoids are frozen by their class
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"model.freeze: {list(patterns)} freeze every parameter, so there is nothing to train")


def add_embedding_noise(model: Any, alpha: float) -> None:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): while training, embeddings get uniform noise of up to
    alpha / sqrt(sequence length x dimension)."""
    import torch

    def add_noise(module: Any, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        bound = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(add_noise)
