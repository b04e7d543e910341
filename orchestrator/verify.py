"""`tuneyard verify`, and the same self-tests at the first launch of a model and attention backend."""

from orchestrator.plan import count_parameters
from orchestrator.preflight import check_job
from orchestrator.screen import Screen
from trainers.job import Job
from trainers.model_source import ModelFolder
from trainers.storage import Folder
from trainers.verification.verify import Verification, demand, verification_key, verify_job

LARGEST = 1_000_000_000
"""Parameters up to which a launch checks by itself: the tests hold the model whole, in fp32, with its gradients."""


def verify(job: Job, again: bool) -> Verification:
    """Check a job's model. Raises JobError or DataError where the job cannot even start."""
    return verify_job(job, check_job(job), again)


def verify_first_launch(job: Job, model: ModelFolder, screen: Screen) -> None:
    """Check a model before it is trained, unless that was done or it is too large for one process.

    Raises:
        TrainingError: naming the checks that failed.
    """
    from pathlib import Path

    if not (Folder(job.storage) / "verify").exists(f"{verification_key(job, model)}.json"):
        parameters = count_parameters(Path(model.path))
        if parameters > LARGEST:
            screen.say(f"self-tests left out: {parameters:,} parameters; run `tuneyard verify` where the model fits")
            return
    found = verify_job(job, model)
    demand(found)
    screen.say(f"verified {found.task} with {found.attention} attention: {len(found.checks)} self-tests passed")
