"""Jobs that `tuneyard submit` sent: which there are, their logs, and stopping them. Ray Jobs keeps them all."""

import time
from typing import TYPE_CHECKING

from orchestrator.submitting.submit import lost
from trainers.errors import JobError, PlacementError
from trainers.records import Record
from trainers.run.describe import duration

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

SENT = "tuneyard-"
"""How the ids begin that `submit` gives."""
STOP_WAIT_S = 300.0
"""How long a job may take to commit its checkpoint and end."""


class SentJob(Record):
    """A job as the cluster knows it."""

    id: str
    job: str
    """Its name in the job file."""
    status: str
    """Ray's: PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    exit_code: int | None
    """Of its driver, once it has ended."""
    started_at: float | None
    """Seconds since 1970."""
    ran_s: float | None
    """Seconds from its start to its end, or to now."""

    def row(self) -> tuple[str, ...]:
        """The values as people read them."""
        age = duration(max(0.0, time.time() - self.started_at)) + " ago" if self.started_at else "-"
        ran = duration(self.ran_s) if self.ran_s is not None else "-"
        return self.id, self.job, self.status, "-" if self.exit_code is None else str(self.exit_code), age, ran


COLUMNS = ("id", "job", "status", "exit", "started", "ran for")


def list_jobs(client: "JobSubmissionClient") -> list[SentJob]:
    """All that the cluster remembers, the oldest first. Raises PlacementError where it does not answer."""
    with lost("list its jobs"):
        details = client.list_jobs()
    found = [_sent(one) for one in details if (one.submission_id or "").startswith(SENT)]
    return sorted(found, key=lambda one: one.started_at or 0.0)


def _sent(details: "JobDetails") -> SentJob:
    start, end = (None if ms is None else ms / 1000 for ms in (details.start_time, details.end_time))
    code = details.driver_exit_code
    return SentJob(
        id=str(details.submission_id),
        job=str((details.metadata or {}).get("job", "")),
        status=str(details.status),
        exit_code=code if code is not None and code >= 0 else None,
        started_at=start,
        ran_s=None if start is None else max(0.0, (end or time.time()) - start),
    )


def find_job(client: "JobSubmissionClient", name: str) -> str:
    """The id that is meant by an id, the start of one, or the name of a job that was sent once.

    Raises:
        JobError: where there is none, or several.
        PlacementError: where the cluster does not answer.
    """
    known = list_jobs(client)
    ids = [one.id for one in known]
    chosen = [one for one in ids if one == name]
    chosen = chosen or [one.id for one in known if one.job == name or one.id.startswith((name, SENT + name))]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise JobError(f"{name!r} fits several jobs: {', '.join(chosen)}; give one of these ids")
    raise JobError(f"no job {name!r} was submitted there; " + (f"there are: {', '.join(ids[-5:])}" if ids else "none"))


def stop_job(client: "JobSubmissionClient", job_id: str) -> str:
    """Ask a job to commit a checkpoint and end, and wait for that. Returns its last status.

    Raises:
        PlacementError: where it has not ended after STOP_WAIT_S, or the cluster does not answer.
    """
    deadline = time.monotonic() + STOP_WAIT_S
    with lost("stop the job"):
        if not client.get_job_status(job_id).is_terminal():
            client.stop_job(job_id)
        while not (status := client.get_job_status(job_id)).is_terminal():
            if time.monotonic() > deadline:
                raise PlacementError(f"{job_id} was asked to stop and has not ended after {STOP_WAIT_S:.0f} s")
            time.sleep(0.5)
    return str(status)
