"""Builds the DeepSpeed engine: model, frozen parameters, optimizer, ZeRO partitioning, in that order."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from trainers.errors import JobError
from trainers.job import Job
from trainers.tasks import Task
from trainers.world import World

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def build_engine(job: Job, task: Task, model_path: str, pad_id: int, config: dict[str, Any], world: World) -> Any:
    """The DeepSpeed engine of this rank; no rank ever holds the whole model under ZeRO-3.

    Args:
        model_path: folder with config.json and safetensors.
        config: what `derive_config` made.
    """
    import deepspeed
    import torch
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # DeepSpeed's all-reduce over shared memory is compiled at first use and waits for ever on a peer that died
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)  # finds the process group that join_world made
    unset_hf_deepspeed_config()
    partition_on_load = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None
    torch.manual_seed(job.train.seed)  # a new head is initialized alike at any world size
    model = task.load_model(model_path, pad_id=pad_id, **load_options(job))
    freeze(model, job.model.freeze)
    model.train()
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, job.train.weight_decay),
        lr=job.train.learning_rate,
        betas=ADAM_BETAS,
        eps=ADAM_EPS,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.partition_on_load = partition_on_load  # transformers keeps only a weak reference
    return engine


def load_options(job: Job) -> dict[str, Any]:
    """Arguments of from_pretrained that the job decides."""
    import torch

    options: dict[str, Any] = {
        "dtype": getattr(torch, job.model.dtype),
        "use_safetensors": True,
        "trust_remote_code": job.model.trust_remote_code,
    }
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
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"model.freeze: {list(patterns)} freeze every parameter, so there is nothing to train")


def weight_decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases and norms (everything with fewer than two dimensions) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in trainable]
    groups = [
        {
            "params": [p for p, shape in zip(trainable, shapes, strict=True) if len(shape) >= 2],
            "weight_decay": weight_decay,
        },
        {"params": [p for p, shape in zip(trainable, shapes, strict=True) if len(shape) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
