"""Whether and when the ranks are started again after a failure. Pure: the controller acts on it."""

from dataclasses import dataclass

LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Failure:
    """Ranks that ended, or hung, before their last step."""

    cause: str
    lost_nodes: tuple[str, ...] = ()
    error: str | None = None
    """What a rank raised and where, if neither storage, memory nor a lost peer is behind it: it can come again."""
    step: int | None = None
    """The last step that the launch made; None where it made none."""


def why_end(failure: Failure, before: Failure | None, failures: int, allowed: int) -> str | None:
    """Why a run ends rather than being started again, or None.

    Args:
        before: the failure of the launch before this one.
        failures: in a row without a new checkpoint, this one included.
        allowed: scale.max_failures.
    """
    if failures > allowed:
        return (
            f"training failed {failures} times in a row without a new checkpoint (scale.max_failures is {allowed}). "
            f"The last time, {failure.cause}"
        )
    if before and failure.error and failure.error == before.error and failure.step == before.step:
        place = "before its first step" if failure.step is None else f"after step {failure.step}"
        return (
            f"training failed twice in the same way {place}, so it would fail again: "
            f"{failure.cause}. Mend the cause and give the same command"
        )
    return None


def pause_s(failure: Failure, failures: int) -> float:
    """Seconds to wait before the next launch: none after a step; else memory or storage may need time to recover."""
    return 0.0 if failure.step is not None else min(2.0 ** (failures - 1), LONGEST_PAUSE_S)
