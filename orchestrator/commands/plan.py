"""`tuneyard plan`, for people."""

import yaml

from orchestrator.planning.plan import Plan, WayMemory
from orchestrator.terminal.table import show

LABELS = 20
"""Labels that are shown."""


def plan_table(plan: Plan, full: bool) -> None:
    """What the job comes to and, where `full`, the job with every default written out."""
    about = "" if plan.exact else "about "
    batch = f"{plan.world_size} workers x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated"
    data = f"{plan.train_rows:,} rows, {plan.train_tokens:,} tokens, {plan.sequences:,} sequences an epoch"
    known = plan.labels or ()
    labels = ", ".join(known[:LABELS]) + (" ..." if len(known) > LABELS else "")
    rows = [
        ("data", about + data),
        ("global batch", f"{plan.global_batch_size:,} sequences = {batch}"),
        ("steps", f"{about}{plan.steps:,}, {plan.checkpoints:,} checkpoints of {plan.checkpoint_gib:.2f} GiB"),
        *([("labels", labels)] if known else []),
        ("chosen by", f"{plan.mode} {plan.metric}"),
        ("model", f"{plan.parameters:,} parameters"),
        ("deepspeed", f"{plan.deepspeed}: {plan.deepspeed_reason}"),
        *((f"  {each.way}", _memory(each)) for each in plan.ways),
        ("memory", f"{plan.state_gib_per_worker:.2f} GiB of state a worker, activations on top"),
        ("host memory", f"{plan.host_gib_per_worker:.2f} GiB a worker for copies of the state"),
        ("run folder", plan.run or "named once the shards are written"),
        *([("first example", plan.example)] if plan.example else []),
        *(("note", note) for note in plan.notes),
    ]
    show("plan", ("what", "value"), rows)
    if full:
        print(yaml.safe_dump(plan.job, sort_keys=False))


def _memory(way: WayMemory) -> str:
    """What a way would need, in words."""
    host = f" and {way.host_gib:.1f} GiB of host memory" if way.host_gib else ""
    return f"would need {way.device_gib:.1f} GiB a device{host}"
