"""What a person reads of an event, under every launcher: one sentence with its values."""

from trainers.run.events import (
    CheckpointEvent,
    CheckpointQuarantinedEvent,
    CheckpointSkippedEvent,
    DoneEvent,
    EvaluationEvent,
    Event,
    HangEvent,
    ProfileEvent,
    RestartEvent,
    RolledBackEvent,
    StartEvent,
    StepEvent,
    StragglerEvent,
    VerificationEvent,
)

STOPPED = {
    "preempted": "on request; the same command goes on from there",
    "early_stopping": "early: evaluate.early_stopping is out of patience",
    "resize": "to go on with another number of workers",
    "paused": "as its sweep asked",
}


def describe(event: Event, metric: str = "") -> str | None:
    """One sentence, or None where there is nothing to tell.

    Args:
        metric: the one that decides; it comes first.
    """
    match event:
        case StartEvent():
            workers = f"{event.world_size} worker{'s' * (event.world_size != 1)}"
            resumed = f", resumed after step {event.step:,}" if event.step else ""
            return f"training on {workers}{resumed}" + (f", to step {event.steps:,}" if event.steps else "")
        case StepEvent():
            speed = f", {event.tokens_per_s:,.0f} tokens/s" if event.tokens_per_s is not None else ""
            return f"step {event.step:,}: loss {event.loss:.4f}{speed}"
        case CheckpointEvent():
            written = f", {event.bytes / 2**20:,.1f} MiB in {event.seconds:.1f} s" if event.bytes else ""
            return f"checkpoint of step {event.step:,} is committed{written}"
        case EvaluationEvent(status="failed"):
            return f"evaluation of step {event.step:,} failed: {event.error}"
        case EvaluationEvent():
            names = sorted(event.metrics, key=lambda name: ("/" in name, name != metric, name))[:4]
            values = ", ".join(f"{name} {event.metrics[name]:.4f}" for name in names)
            return f"evaluation of {f'step {event.step:,}' if event.step else 'the pretrained model'}: {values}"
        case VerificationEvent(failed=()):
            return f"self-tests: all {event.passed} passed in {event.seconds:.0f} s"
        case VerificationEvent():
            return f"self-tests: {event.passed} passed, {len(event.failed)} failed: {', '.join(event.failed)}"
        case ProfileEvent():
            return _describe_profile(event)
        case DoneEvent(stopped=None):
            return f"training is done: step {event.step:,}, {event.tokens:,} tokens"
        case DoneEvent():
            return f"training stopped after step {event.step:,} {STOPPED[str(event.stopped)]}"
    return _describe_trouble(event)


def _describe_profile(event: ProfileEvent) -> str:
    busy = "" if event.busy_s is None else f", the GPU computes for {event.busy_s / event.step_s:.0%} of it"
    share = "" if event.mfu is None else f" at {event.mfu:.1%} of its peak"
    most = ", ".join(f"{name} {seconds:.3f} s" for name, seconds, _ in event.operators[:3])
    return f"profile: a step takes {event.step_s:.3f} s{busy}{share}; most go to {most}; trace: {event.trace}"


def _describe_trouble(event: Event) -> str | None:
    match event:
        case CheckpointSkippedEvent():
            return f"checkpoint of step {event.step:,} was not kept: {event.reason}"
        case CheckpointQuarantinedEvent():
            return f"checkpoint of step {event.step:,} is damaged and was set aside: {event.reason}"
        case RolledBackEvent():
            return (
                f"step {event.step:,} diverged: {event.reason}. Going back to the newest checkpoint; the rows of this "
                "step are left out (skipped.json)"
            )
        case StragglerEvent():
            return f"rank {event.rank} is slow: the others wait {event.lag_s:.2f} s a step for it"
        case HangEvent():
            return f"the ranks hang: rank {event.rank} at step {event.step:,}, phase {event.phase}, {event.line}"
        case RestartEvent():
            count = f" (failure {event.failures} in a row without a new checkpoint)" if event.failures > 1 else ""
            return f"training failed{count}: {event.cause}"
    return None


def duration(seconds: float) -> str:
    """A duration in the two units that matter: 42 s, 3 min 5 s, 2 h 10 min, 1 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{whole} s"


def interval(low: float, high: float) -> str:
    """Three decimals, or four digits where they are large or tiny."""
    ends = [f"{end:.3f}" if end == 0 or 1e-3 <= abs(end) < 100 else f"{end:.4g}" for end in (low, high)]
    return (" to " if "-" in "".join(ends) else "\u2013").join(ends)
