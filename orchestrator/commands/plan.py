"""`tuneyard plan`, for people."""

import yaml

from orchestrator.planning.costs import WayMemory
from orchestrator.planning.plan import Plan
from orchestrator.terminal.table import show
from trainers.model.deepspeed_config import keeps_on_disk
from trainers.model.memory import GIVE_BACK_BYTES
from trainers.run.describe import duration

LABELS = 20
"""Labels that are shown."""
GIVE_BACK = f"MALLOC_MMAP_THRESHOLD_={GIVE_BACK_BYTES}"
HOST = {"host": "state and activations", "staging": "staging of checkpoints"}


def plan_table(plan: Plan, full: bool) -> None:
    """What the job comes to and, where `full`, the job with every default written out."""
    about = "" if plan.exact else "about "
    workers = f"{plan.world_size} workers"
    if plan.sequence_parallel > 1:
        groups = plan.world_size // plan.sequence_parallel
        workers = f"{groups} group{'s' * (groups > 1)} of {plan.sequence_parallel} workers that share each sequence"
    batch = f"{workers} x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated"
    shorter = (
        "; shorter ones go together to as many tokens" if plan.lengths_differ and plan.global_batch_size > 1 else ""
    )
    data = f"{plan.train_rows:,} rows, {plan.train_tokens:,} tokens, {plan.sequences:,} sequences an epoch"
    known = plan.labels or ()
    labels = ", ".join(known[:LABELS]) + (" ..." if len(known) > LABELS else "")
    rows = [
        ("data", about + data),
        ("global batch", f"{plan.global_batch_size:,} sequences = {batch}{shorter}"),
        ("steps", f"{about}{plan.steps:,}, {plan.checkpoints:,} checkpoints of {plan.checkpoint_gib:.2f} GiB"),
        *([("labels", labels)] if known else []),
        ("chosen by", f"{plan.mode} {plan.metric}"),
        ("model", f"{plan.parameters:,} parameters"),
        ("deepspeed", f"{plan.deepspeed}: {plan.deepspeed_reason}"),
        ("layers again", _again(plan.activation_checkpointing) + "; feed-forward in tiles" * plan.feed_forward_tiles),
        *_memory(plan),
        ("disk", f"{plan.disk_gib:,.2f} GiB at the most for checkpoints and the exported model"),
        *([("messages", f"{sent:.2f} GiB that each worker sends a step")] if (sent := plan.sent_gib_per_step) else []),
        ("arithmetic", f"{about}{plan.flops:.3g} floating-point operations"),
        *([("time", _hours(plan))] if plan.hours else []),
        ("evaluation", plan.evaluation),
        ("run folder", plan.run or "named once the shards are written"),
        *([("first example", plan.example)] if plan.example else []),
        *(("note", note) for note in plan.notes),
    ]
    show("plan", ("what", "value"), rows)
    if plan.ways:
        _memory_table(plan)
        print(_verdict(plan))
    if full:
        if plan.settings:
            settings = [(name, f"{value:,}", reason) for name, value, reason in plan.settings]
            show("DeepSpeed's settings, from the model's sizes", ("setting", "value", "why"), settings)
        print(yaml.safe_dump(plan.job, sort_keys=False))


def _again(setting: str | int) -> str:
    """Of which layers only the input is kept for the backward pass, in words."""
    return {"none": "none", "full": "every layer's activations"}.get(
        str(setting), f"activations of one layer in {setting}"
    )


def _memory(plan: Plan) -> list[tuple[str, str]]:
    """What a worker takes: at the fullest moment where that was counted, else of state alone."""
    way = next((way for way in plan.ways if way.way == plan.deepspeed), None)
    if way is None:
        return [("memory", f"{plan.state_gib_per_worker:.2f} GiB of state a worker, activations on top"),
                ("host memory", f"{plan.host_gib_per_worker:.2f} GiB a worker for copies of the state")]  # fmt: skip
    place, host = "a worker" if plan.on_cpu else "of a worker's GPU", way.host_gib + way.staging
    return [("memory", f"{way.device_gib:.1f} GiB {place} at the fullest moment of a step"),
            ("host memory", f"{host:.1f} GiB a worker for state, activations and copies")]  # fmt: skip


def _hours(plan: Plan) -> str:
    cost = f", costs {plan.cost:,.2f}" if plan.cost else ""
    return f"about {duration((plan.hours or 0) * 3600)}{cost}"


def _memory_table(plan: Plan) -> None:
    """What each way would need, by part; a column a way."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "working", "margin", "device")
    names = [way.way.replace("-", "-\n", 1) + "\n(chosen)" * (way.way == plan.deepspeed) for way in plan.ways]
    rows = [("fullest at the", *(way.moment for way in plan.ways))]
    place = "host" if plan.on_cpu else "GPU"
    for name in parts:
        shown = "all of it" if name == "device" else name
        rows.append((f"{place}: {shown}", *(f"{_part(way, name):.1f}" for way in plan.ways)))
    rows += [(f"host: {shown}", *(f"{_part(way, name):.1f}" for way in plan.ways)) for name, shown in HOST.items()]
    if any(way.disk_gib for way in plan.ways):
        rows.append(("disk: state", *(f"{way.disk_gib:.1f}" for way in plan.ways)))
    if plan.device_gib is not None:
        rows.append(("fits", *("yes" if way.fits else "no" for way in plan.ways)))
    show("GiB a worker with this step, at its fullest moment", ("", *names), rows)


def _part(way: WayMemory, name: str) -> float:
    value: float = getattr(way, f"{name}_gib" if name in ("device", "host") else name)
    return value


def _verdict(plan: Plan) -> str:
    """Whether the job fits its devices, and what to change where it does not."""
    if plan.fits and plan.on_cpu and keeps_on_disk(plan.deepspeed):
        return f"fits {plan.device_gib:.1f} GiB a worker"  # ranks with state on disk give freed memory back
    if plan.fits and plan.on_cpu:
        return f"fits {plan.device_gib:.1f} GiB a worker with {GIVE_BACK} in the environment; without it the C library"\
               " kept up to 35 % more of what was freed (docs/memory.md)"  # fmt: skip
    if plan.fits:
        return f"fits a worker's device of {plan.device_gib:.1f} GiB"
    if not plan.remedy:
        advice = "shorten data.max_length, or train adapters (model.lora)"
        return f"does not fit, and neither settings nor more workers were found with which it does: {advice}"
    return "does not fit; the smallest change that does: " + " ".join(f"--set {each}" for each in plan.remedy)
