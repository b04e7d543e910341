"""`tuneyard verify`, for people: numerical self-tests of a checked job."""

from orchestrator.terminal.table import show
from trainers.verification.verdict import Verification


def verification_table(found: Verification) -> None:
    """One line a self-test."""
    rows = [(one.name, "ok" if one.passed else "fail", one.detail, round(one.seconds, 1)) for one in found.checks]
    title = f"self-tests of task {found.task} with {found.attention} attention, key {found.key}"
    show(title, ("test", "state", "found", "seconds"), rows, [row[1] for row in rows])
