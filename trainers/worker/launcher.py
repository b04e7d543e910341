"""What a launcher other than the controller says in the environment, held against the job: `check_launcher`."""

from collections.abc import Mapping
from typing import Any

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.model.deepspeed_config import derive_config, job_batches

AUTO = "auto"


def check_launcher(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Compare what `accelerate launch` or `torchrun` was told with what the job asks for.

    Returns:
        What the user should know although it is no error.

    Raises:
        JobError: with every setting of an accelerate configuration that contradicts the job.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    batches = job_batches(job, world)
    is_open = job.train.deepspeed == AUTO  # settled once the devices are known, so no stage contradicts it
    config = {} if is_open else derive_config(job, batches)
    zero: dict[str, Any] = config.get("zero_optimization") or {}
    offload = {part: str((zero.get(f"offload_{part}") or {}).get("device", "none")) for part in ("optimizer", "param")}
    ours = {
        "DEEPSPEED_ZERO_STAGE": ("deepspeed_config.zero_stage", str(zero.get("stage", 0))),
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("deepspeed_config.offload_optimizer_device", offload["optimizer"]),
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("deepspeed_config.offload_param_device", offload["param"]),
        "MIXED_PRECISION": ("mixed_precision", {"bfloat16": "bf16", "float32": "no"}[job.model.dtype]),
        "GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", str(batches.accumulation)),
    }
    if is_open:
        ours = {name: value for name, value in ours.items() if not name.startswith("DEEPSPEED_")}
    silent = {"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1"}  # what accelerate says when it was not told
    problems = []
    for name, (key, value) in ours.items():
        told = environment.get(f"ACCELERATE_{name}", "").lower()
        if told not in ("", "none", "auto", value, silent.get(name)):
            problems.append(f"the accelerate configuration says {key}: {told}, but the job means {value}")
    if problems:
        raise JobError(
            [f"{problem}; the job file decides: change one of them (train.deepspeed, model.dtype, "
             "train.micro_batch_size)" for problem in problems]
        )  # fmt: skip
    notes = []
    if is_open and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        notes.append("train.deepspeed is auto: it decides, not the accelerate configuration's ZeRO stage and offload")
    if job.scale.max_workers not in (1, world):
        notes.append(f"scale.workers is {job.scale.max_workers}, but the launcher started {world} ranks, which count")
    return notes
