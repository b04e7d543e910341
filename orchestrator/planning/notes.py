"""What a user should know of a job before it starts, although nothing of it is an error."""

import json
import math
import os
from pathlib import Path

from orchestrator.evaluation.room import FREE, Place, place_evaluations
from orchestrator.planning.costs import weight_bytes
from orchestrator.planning.preflight import CheckedJob
from orchestrator.ray_session import gpus_per_worker, usable_cpus
from trainers.batching.batch_plan import BatchPlan
from trainers.job.schema import Job
from trainers.model.fit import tensor_shapes, tested_families
from trainers.shards.manifest import Shards
from trainers.shards.worth import metric_refusal
from trainers.tasks import encode_rules
from trainers.tasks.chat.render import renderer_of
from trainers.tokenizer.encoder import load_encoder
from trainers.tokenizer.stand_in import CHARACTERS


def all_notes(checked: CheckedJob, batches: BatchPlan, steps: int, elsewhere: bool) -> tuple[str, ...]:
    """What the checks found, then the architecture, the chat template, and the job on the machines it is meant for.

    Args:
        elsewhere: the plan is for other devices than this machine's.
    """
    job, model = checked.job, checked.model
    bare = [] if tensor_shapes(Path(model.path)) else ["the model folder holds no weights: `tuneyard run` refuses it"]
    if model.stand_in:
        bare.append(
            f"the model folder holds no tokenizer: {CHARACTERS} characters are counted as a token, by which sequences, "
            "steps and time are rough; memory does not depend on it; `tuneyard run` refuses it"
        )
    chat = [] if model.stand_in else chat_notes(job, model.path)
    ours = (*architecture_notes(checked), *chat, *notes(job, batches, steps, elsewhere))
    return (*checked.notes, *bare, *ours)


def architecture_notes(checked: CheckedJob) -> list[str]:
    """Whether the family is among those that the tests compare with plain transformers, and why a job does not pack."""
    config = json.loads((Path(checked.model.path) / "config.json").read_text(encoding="utf-8"))
    family, known = str(config.get("model_type")), tested_families()
    tasks = known.get(family)
    if tasks is None:
        found = [f"{family} is not among the {len(known)} families of docs/models.md: `tuneyard verify` tests it"]
    elif checked.job.task not in tasks:
        found = [f"{family} is in docs/models.md, but not with task {checked.job.task}: `tuneyard verify` tests it"]
    else:
        found = [f"{family} is in docs/models.md with task {checked.job.task}"]
    if checked.packing is not None and not checked.job.packing:
        found.append(f"packing is off, for documents of a pack would see each other here: {checked.packing.reason}")
    if checked.packing is not None and checked.job.model.attention == checked.packing.attention:
        found.append("packed documents attend each by its bounds, without a mask (model.attention: documents)")
    return found


def chat_notes(job: Job, model_path: str) -> list[str]:
    """What to know of a chat template: how it ends the assistant's turns, whether it writes the date."""
    if job.task != "sft":
        return []
    encoder, template = load_encoder(model_path, job.model.trust_remote_code), encode_rules(job).options.chat_template
    ending = renderer_of(encoder, encoder.fast, template).ending()
    found = []
    if not ending:
        found = ["the chat template writes nothing behind the assistant's last turn: the model does not learn to stop"]
    elif not ending.startswith(tuple(encoder.tokenizer.added_tokens_encoder)):
        found = [
            f"the chat template ends turns with {ending[:40]!r}, which is no token of its own: generation does not "
            "stop there; end them with an added token, such as the tokenizer's eos_token"
        ]
    if "strftime_now" in str(template or encoder.tokenizer.chat_template):
        found.append("the chat template writes today's date: shards hold the day on which they are written")
    return found


def notes(job: Job, batches: BatchPlan, steps: int, elsewhere: bool) -> list[str]:
    """What a user would want to know before starting."""
    found = []
    on_cpu = not elsewhere and (job.scale.gpus_per_worker == 0 or not _gpus())
    if job.model.dtype == "bfloat16" and not cpu_has_bf16() and on_cpu:
        found.append("this CPU has no bf16 arithmetic: model.dtype float32 is faster here")
    if job.data.max_drop_fraction:
        found.append(f"up to {job.data.max_drop_fraction:.2%} of the rows may be dropped without a refusal")
    if steps < job.checkpoint.every_steps:
        found.append(f"only the last step is saved: {steps} steps are fewer than checkpoint.every_steps")
    if batches.accumulation == 1 and batches.micro_batch_size == 1:
        found.append("one sequence a rank and step: a larger train.global_batch_size would use the hardware better")
    return found


def metric_notes(job: Job, shards: Shards | None, model_path: str) -> list[str]:
    """Whether the evaluation rows can give the metric that chooses; told once the shards are there."""
    refusal = metric_refusal(job, shards, model_path) if shards else None
    return [f"{refusal} (`tuneyard run` refuses it)"] if refusal else []


def cpu_has_bf16() -> bool:
    """Whether /proc/cpuinfo lists bf16 instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def where_evaluated(job: Job, parameters: int, device_bytes: int | None, elsewhere: bool) -> str:
    """Where checkpoints are evaluated while the training runs, and why; what a cluster has is known at the start only.

    Args:
        device_bytes: memory of a worker's device; None where workers compute on CPUs.
    """
    elsewhere = elsewhere or "RAY_ADDRESS" in os.environ
    here = {"CPU": float(usable_cpus()), "GPU": float(_gpus())}
    resources = dict.fromkeys(here, math.inf) if elsewhere else here
    gpus = gpus_per_worker(job.scale, resources)
    place = place_evaluations(job, gpus, resources, weight_bytes(job, parameters), device_bytes)
    if elsewhere and job.evaluate.on == "auto" and place == Place("free", FREE):
        return "beside the training where a device is free, else by the ranks between two steps"
    refused = not place.is_possible and job.evaluate.early_stopping
    return f"{place}{'; evaluate.early_stopping is refused there' if refused else ''}"
