"""`tuneyard verify`: numerical self-tests of a checked job."""

from orchestrator.planning.preflight import check_job
from trainers.job.schema import Job
from trainers.verification.verify import Verification, verify_job


def verify(job: Job, again: bool) -> Verification:
    """Check a job's model. Raises JobError or DataError where the job cannot even start."""
    return verify_job(job, check_job(job), again)
