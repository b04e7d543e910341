"""Which checkpoints may be deleted. Pure: the owner (the controller, or rank 0 without one) acts on it."""

from collections.abc import Collection, Sequence


def deletable(committed: Sequence[int], keep: int, pinned: Collection[int]) -> list[int]:
    """Steps that may go: neither among the newest `keep`, nor pinned (best, promoted, being evaluated).

    Args:
        committed: steps with a commit marker, in any order.
        keep: at least 1, so the newest always stays.
    """
    newest = set(sorted(committed)[-keep:])
    return [step for step in sorted(committed) if step not in newest and step not in pinned]
