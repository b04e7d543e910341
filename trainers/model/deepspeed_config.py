"""The one place where a DeepSpeed configuration is made: a template from ds_configs/ plus what the job says.

A template says how to partition and offload. Batch sizes, precision, clipping, optimizer and schedule belong to the
job: a template that states another value is refused with both values.
"""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainers.batching.batch_plan import BatchPlan, plan_batches
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.storage import is_remote

SUPPORTED_STAGES = (0, 1, 2, 3)
UNSUPPORTED = {
    "mics_shard_size": "shards within groups of ranks (MiCS), which checkpoints do not lay out",
    "zero_quantized_weights": "keeps working weights quantized, from which checkpoints cannot be restored exactly",
    "zero_quantized_nontrainable_weights": "keeps frozen weights quantized, which checkpoints cannot hold",
}
"""Options of zero_optimization under which a checkpoint would be wrong, and why."""
PIPELINES = ("pipeline_read", "pipeline_write")
READ_AHEAD = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
"""Where weights are on disk, DeepSpeed 0.19 reads ahead, and keeps, more of them than it has buffers for, and fails."""
OFFLOADED = ("offload_optimizer", "offload_param")
OWNED_BY_THE_JOB = {
    "optimizer": "train.learning_rate and train.weight_decay (AdamW)",
    "scheduler": "train.schedule and train.warmup_ratio",
    "fp16": "model.dtype (float32 or bfloat16)",
    "amp": "model.dtype (float32 or bfloat16)",
}


def read_template(name: str) -> dict[str, Any]:
    """The template of that name in ds_configs/, or the JSON file at that path.

    Raises:
        JobError: where there is none, it is not JSON, or its ZeRO stage cannot be used.
    """
    folder = files("ds_configs")
    source = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    try:
        template = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        known = sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))
        raise JobError(f"train.deepspeed: {name!r} is neither a file nor one of {', '.join(known)}") from None
    except ValueError as error:
        raise JobError(f"train.deepspeed: {source} is not valid JSON: {error}") from None
    stage = template.get("zero_optimization", {}).get("stage") if isinstance(template, dict) else None
    if stage not in SUPPORTED_STAGES:
        raise JobError(f"train.deepspeed: {source} must set zero_optimization.stage to 0, 1, 2 or 3, not {stage!r}")
    if stage == 0 and template != {"zero_optimization": {"stage": 0}}:
        raise JobError(
            f"train.deepspeed: {source} sets zero_optimization.stage to 0, which trains without DeepSpeed and knows "
            "no other setting: take the others out, or name a stage from 1 to 3"
        )
    return dict(template)


def derive_config(job: Job, batches: BatchPlan) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets.

    The file may say how a step is cut if all its sequences are as long as the longest; the engine is given the most
    micro-batches that a step may take, and told at each whether it is the last.

    bf16 gradients of several micro-batches are summed in fp32: in bf16 a sum of 64 would be off by about 1 %, for 2
    bytes a parameter less. Under stage 1 DeepSpeed takes another optimizer for that, which checkpoints do not know.

    Raises:
        JobError: with every value of the template that contradicts the job.
    """
    template = read_template(job.train.deepspeed)
    derived = _derived(job, batches)
    if derived["bf16"]["enabled"] and batches.rounds > 1 and template["zero_optimization"]["stage"] > 1:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    problems = [
        f"{job.train.deepspeed} sets {key!r}, which belongs to the job: {owner}"
        for key, owner in OWNED_BY_THE_JOB.items()
        if _is_on(template.get(key))
    ]
    problems += [
        f"{job.train.deepspeed} sets zero_optimization.{option}, which {reason}: take it out of the file"
        for option, reason in UNSUPPORTED.items()
        if template["zero_optimization"].get(option, 0) not in (0, -1, False)
    ]
    problems += [
        f"{job.train.deepspeed} says {path} = {json.dumps(theirs)}, the job {json.dumps(ours)}: take it out of the file"
        for path, theirs, ours in _contradictions(template, derived)
    ]
    problems += _offload_problems(job, template["zero_optimization"])
    if problems:
        raise JobError(problems, "train.deepspeed")
    for section in disk_sections(template["zero_optimization"]):
        section.setdefault("nvme_path", job.train.offload_folder)
    if (template["zero_optimization"].get("offload_param") or {}).get("device") == "nvme":
        for key in READ_AHEAD:
            template["zero_optimization"].setdefault(key, 0)
    kept = {key: value for key, value in template.items() if key not in OWNED_BY_THE_JOB}
    most = {
        "train_micro_batch_size_per_gpu": batches.per_rank // batches.rounds,
        "gradient_accumulation_steps": batches.rounds,
    }
    return _merge(kept, derived) | most


def job_batches(job: Job, world_size: int, way: str | None = None, micro: int | None = None) -> BatchPlan:
    """How a job's step is cut. Where sequences differ in length it may take more micro-batches than it must, if that
    takes no memory: under stage 3 the sum of fp32 gradients is always there.

    Args:
        way: a template in the place of the job's.
        micro: the size of a micro-batch in the place of the job's.

    Raises:
        JobError: where the batch does not divide.
    """
    train, way = job.train, way or job.train.deepspeed
    plan = plan_batches(
        train.global_batch_size,
        micro or train.micro_batch_size,
        world_size,
        job.data.max_length,
        sharing=train.sequence_parallel,
    )
    if not job.lengths_differ or job.model.dtype != "float32" or way == "auto":
        return plan
    return replace(plan, spread=read_template(way)["zero_optimization"]["stage"] == 3)


def keeps_on_disk(name: str) -> bool:
    """Whether a template keeps weights or optimizer state on disk. Raises JobError where there is none."""
    return name != "auto" and bool(disk_sections(read_template(name)["zero_optimization"]))


def offloads(name: str) -> bool:
    """Whether a template keeps the optimizer's state beyond the devices. Raises JobError where there is none."""
    section = read_template(name)["zero_optimization"].get("offload_optimizer") or {}
    return bool(section.get("device", "none") != "none")


def way_of(name: str) -> str | None:
    """The template that a template or a file of the job's own is like in how it keeps the state; None where it is like
    none: with the optimizer alone beyond the devices. Raises JobError where there is none of that name."""
    zero = read_template(name)["zero_optimization"]
    devices = {(zero.get(part) or {}).get("device", "none") for part in OFFLOADED}
    way = f"zero{zero['stage']}" if devices == {"none"} else f"zero{zero['stage']}-{'-'.join(devices)}-offload"
    return way if (files("ds_configs") / f"{way}.json").is_file() else None


def own_settings(name: str) -> dict[str, int]:
    """Numbers that a file of the job's own sets under zero_optimization, by DeepSpeed's names, those of a section as
    section.name; of a template none. Raises JobError where there is no such file."""
    if not name.endswith(".json"):
        return {}
    zero = read_template(name)["zero_optimization"]
    sections = {f"{part}.{key}": value for part in OFFLOADED for key, value in (zero.get(part) or {}).items()}
    return {key: int(value) for key, value in (zero | sections).items()
            if isinstance(value, int | float) and not isinstance(value, bool)}  # fmt: skip


def disk_sections(zero: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of what is kept on disk."""
    return [zero[part] for part in OFFLOADED if (zero.get(part) or {}).get("device") == "nvme"]


def _offload_problems(job: Job, zero: dict[str, Any]) -> list[str]:
    """What is wrong with the settings of state on disk."""
    name, folder, sections = job.train.deepspeed, job.train.offload_folder, disk_sections(zero)
    problems = [
        f"{name} sets zero_optimization.offload_optimizer.{option}, which leaves writes under way that a checkpoint "
        "would have to wait for: take it out of the file"
        for option in PIPELINES
        if (zero.get("offload_optimizer") or {}).get(option)
    ]
    if sections and folder is None and any("nvme_path" not in section for section in sections):
        problems.append(
            f"train.offload_folder: {name} keeps weights and optimizer state on each node's own disk; name a folder "
            "there, such as /local_nvme, with about 18 bytes a parameter free over all nodes"
        )
    if folder is not None and any(section.get("nvme_path", folder) != folder for section in sections):
        problems.append(f"{name} says nvme_path, the job train.offload_folder {folder}: take one of them out")
    if folder is not None and not sections:
        problems.append(f"train.offload_folder: {name} keeps nothing on disk; leave it out, or take zero3-nvme-offload")
    if folder is not None and is_remote(folder):
        problems.append(f"train.offload_folder: {folder} is no disk of the node; name a folder on one")
    return problems


def _derived(job: Job, batches: BatchPlan) -> dict[str, Any]:
    return {
        "train_batch_size": batches.global_batch_size * batches.sharing,  # it counts a sequence once a rank
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.accumulation,
        "gradient_clipping": job.train.max_grad_norm,
        "bf16": {"enabled": job.model.dtype == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPU too, without a compiler
    }


def _is_on(section: Any) -> bool:
    return bool(section) and (not isinstance(section, dict) or section.get("enabled", True) is not False)


def _contradictions(template: dict[str, Any], derived: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    differing: list[tuple[str, Any, Any]] = []
    for key, ours in derived.items():
        theirs = template.get(key, "auto")
        if isinstance(ours, dict) and isinstance(theirs, dict):
            differing += _contradictions(theirs, ours, f"{prefix}{key}.")
        elif theirs not in ("auto", ours):
            differing.append((f"{prefix}{key}", theirs, ours))
    return differing


def _merge(template: dict[str, Any], derived: dict[str, Any]) -> dict[str, Any]:
    merged = dict(template)
    for key, value in derived.items():
        nested = merged.get(key)
        merged[key] = _merge(nested, value) if isinstance(value, dict) and isinstance(nested, dict) else value
    return merged
