"""Where the memory went: what the plan counted by part, beside the peak that each rank measured. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.report.table import Table
from trainers.run.events import DoneEvent, Event, StepEvent

DEVICE = ("weights", "gradients", "optimizer", "activations", "logits", "working", "margin")
MOST_RANKS = 8
"""Ranks that are told one by one."""


def memory_table(plan: Mapping[str, Any], events: Sequence[Event]) -> Table | None:
    """Planned and measured memory of a worker; None where nothing is known of either.

    Args:
        plan: as it stands in plan.json; empty where it cannot be read.
    """
    ended = [event for event in events if isinstance(event, DoneEvent) and event.host_gib]
    device, host = (ended[-1].device_gib, ended[-1].host_gib) if ended else ((), ())
    told = [event.memory_gib for event in events if isinstance(event, StepEvent) and event.memory_gib is not None]
    rows: list[tuple[str, float | None, str | None]] = list(_planned(plan)) if plan else []
    if device:
        rows.append(("GPU: tensors at their peak", None, by_rank(device)))
    if host:
        rows.append(("host: resident at the peak, with all libraries", None, by_rank(host)))
    if told and not ended:
        rows.append(("the first rank's peak; the others' are told when all have ended", None, f"{max(told):.2f}"))
    way = _chosen(plan)
    moment = f", at the {way['moment']}" if way else ""
    how = [f"{name} {plan[name]}" for name in ("deepspeed", "activation_checkpointing") if name in plan]
    title = f"GiB a worker: planned{moment}, and measured; {', '.join(how)}".removesuffix("; ")
    return Table(title, ("", "planned", "measured"), rows) if rows else None


def _chosen(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((way for way in plan.get("ways", ()) if way["way"] == plan["deepspeed"]), {})


def _planned(plan: Mapping[str, Any]) -> Iterator[tuple[str, float | None, str | None]]:
    way = _chosen(plan)
    place = "GPU" if way and not plan["on_cpu"] else "host"
    if not way:
        yield f"{place}: weights, gradients and optimizer state", plan["state_gib_per_worker"], None
        yield "host: copies for checkpoints", plan["host_gib_per_worker"], None
        return
    for part in DEVICE:
        yield f"{place}: {part}", way[part], None
    yield f"{place}: all of these", way["device_gib"], None
    yield "host: copies for checkpoints", way["staging"], None
    if way["host_gib"]:
        yield "host: state that is kept there", way["host_gib"], None
    if way["disk_gib"]:
        yield "disk: state that is kept there", way["disk_gib"], None


def by_rank(peaks: Sequence[float]) -> str:
    """Each rank's, or the range where they are many."""
    if len(peaks) <= MOST_RANKS:
        return ", ".join(f"rank {rank} {peak:.2f}" for rank, peak in enumerate(peaks))
    most = max(range(len(peaks)), key=peaks.__getitem__)
    return f"{min(peaks):.2f} to {peaks[most]:.2f} over {len(peaks)} ranks, most on rank {most}"
