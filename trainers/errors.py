"""Everything that can end a job for a reason the user should read, each with its process exit code.

A `TuneyardError` is shown as one message without a traceback; any other exception is a defect of ours. Between
processes an error travels as a record of plain JSON values: `to_record`, `from_record`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

PASSING = re.compile(
    r"out of memory|can't allocate memory|\(os error (?!2\))"
    r"|aws error (network_connection|slow_down|service_unavailable|request_timeout|internal_failure|throttling)"
    r"|aws error [^:]*\(http status (429|5\d\d)\)"
    r"|google::cloud::status\((unavailable|deadline_exceeded|internal|aborted|resource_exhausted)",
    re.IGNORECASE,
)
"""What libraries say of it in their texts alone; the last three of a bucket that does not answer, by pyarrow."""


class TuneyardError(Exception):
    """A failure with a known cause; the message names the rule, the values and the remedy."""

    exit_code = 1


class JobError(TuneyardError, ValueError):
    """The job file or the arguments are wrong. Carries every problem found, not only the first.

    Args:
        problems: one or several.
        where: what messages call the job.
        unchecked: what could not be looked at, because it depends on a value that is wrong.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str, where: str = "", unchecked: Sequence[str] = ()) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.where = where
        self.unchecked = tuple(unchecked)
        head = f"{where}: " if where else ""
        body = self.problems[0] if len(self.problems) == 1 else "".join(f"\n  - {p}" for p in self.problems)
        count = "" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        rest = f"\nnot checked, for it depends on a wrong value: {', '.join(self.unchecked)}" if unchecked else ""
        super().__init__(f"{head}{count}{body}{rest}")

    def __reduce__(self) -> tuple[type["JobError"], tuple[tuple[str, ...], str, tuple[str, ...]]]:
        return type(self), (self.problems, self.where, self.unchecked)


class PlacementError(TuneyardError):
    """The job cannot fit on, or be placed on, the machines at hand."""

    exit_code = 3


class DataError(TuneyardError, ValueError):
    """The data is refused: unreadable, empty, over the drop budget, or with labels training never saw."""

    exit_code = 4


class TrainingError(TuneyardError):
    """Training failed and its restarts are used up."""

    exit_code = 5


class EvaluationError(TuneyardError):
    """An evaluation or a registration is refused."""

    exit_code = 6


class Preempted(TuneyardError):
    """The run was asked to stop; its last checkpoint is committed and the same command goes on."""

    exit_code = 75


def to_record(error: BaseException) -> dict[str, Any]:
    """An error as JSON values, for another process: type, message, exit code, and a JobError's problems."""
    record = {"type": type(error).__name__, "message": str(error), "exit_code": getattr(error, "exit_code", 1)}
    if isinstance(error, JobError):
        record |= {"problems": list(error.problems), "where": error.where, "unchecked": list(error.unchecked)}
    return record


def describe(record: Mapping[str, Any]) -> str:
    """A record as one text, with the type before the message."""
    return f"{record['type']}: {record['message']}"


def from_record(record: Mapping[str, Any]) -> TuneyardError:
    """The error of a record: of its own type where that is one of ours; else the type stands in its message."""
    kinds, kind = [TuneyardError], None
    for known in kinds:
        kinds += known.__subclasses__()
        kind = known if known.__name__ == record["type"] else kind
    if kind is JobError:
        return JobError(record["problems"], record["where"], record.get("unchecked", ()))
    if kind is not None:
        return kind(record["message"])
    error = TuneyardError(describe(record))
    error.exit_code = record["exit_code"]
    return error


def may_pass(error: BaseException) -> bool:
    """Whether a later try may go well: storage or memory failed somewhere behind the error, not a check of ours.

    A file that is not there is an answer. So is an OSError without a number: transformers raises it for models that it
    does not find. The tokenizers library names the number in its text alone.
    """
    cause: BaseException | None = error
    while cause is not None:
        lasting = isinstance(cause, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError)
        if isinstance(cause, OSError) and cause.errno is not None and not lasting:
            return True
        if isinstance(cause, MemoryError | ConnectionError | TimeoutError) or PASSING.search(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
