"""What becomes of a sweep's runs that are not the best: checkpoints and exports go; evaluations and logs stay."""

import logging
import time

from trainers.checkpoint.cleaning import remove_beside
from trainers.job.schema import Job
from trainers.run.folder import CLEANED, checkpoints_folder, promoted_steps
from trainers.storage import Folder

log = logging.getLogger(__name__)


def clean_run(job: Job, run: Folder) -> bool:
    """Delete checkpoints and exports in threads, unless a version of the run is registered. A mark says before that the
    run begins anew where it is trained again, and that nobody lost its checkpoints.

    Returns:
        False where storage does not do it now.
    """
    try:
        if promoted_steps(run) or not run.exists():
            return True
        run.write_json(CLEANED, {"schema_version": 1, "time": time.time()})
    except OSError as error:
        log.warning(f"{run} cannot be cleaned now, which is tried again: {error}")
        return False
    remove_beside(checkpoints_folder(job, run), run / "export")
    return True
