"""Whether a run may begin at step 0, and what becomes of an earlier training of it. Begin at `begin_run`.

Nothing committed is how every run begins. Where its log tells of checkpoints, they were lost: that is said, not passed
over. And where training begins again, evaluations and exports of then are of other weights than those to come.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from trainers.checkpoint.reading import committed_steps
from trainers.errors import TrainingError
from trainers.patience import retrying
from trainers.run.events import CheckpointEvent, read_events
from trainers.run.folder import CLEANED, parse_step
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.training.continuing import has_begun

OF_A_TRAINING = ("evals", "export")
"""Folders of a run that hold what was made of its checkpoints."""


def begin_run(run: Run, anew: bool = False, is_registered: Callable[[Folder], bool] = lambda _: False) -> str | None:
    """Look whether a run has checkpoints to go on from; where it begins at step 0, set aside what an earlier training
    left. The owner of the run folder calls it before it reads evaluations and starts the ranks.

    Args:
        anew: begin at step 0 also where checkpoints are gone, as `checkpoint.start_over` says.
        is_registered: whether a version in the registry names this folder of an export.

    Returns:
        What is to be told, if anything.

    Raises:
        TrainingError: where checkpoints are gone, or a registered version would lose its files.
    """
    if _goes_on(run):
        return None
    gone = _gone(run)
    if gone and not anew and not run.job.checkpoint.start_over:
        raise TrainingError(_explain(run, gone))
    places = set_aside(run.folder, is_registered)
    if gone:
        run.folder.write_json(CLEANED, {"schema_version": 1, "time": time.time()})
    if not places and not gone:
        return None
    what = f"what was made of earlier ones lies in {places[0].parent} now" if places else "nothing else is left of it"
    return f"note: the run begins anew at step 0: {run.checkpoints} holds no checkpoint; {what}"


def check_begun(run: Run) -> None:
    """Rank 0, at each launch: raises TrainingError where the run's checkpoints are gone, as `begin_run` does."""
    if not run.job.checkpoint.start_over and not _goes_on(run) and (gone := _gone(run)):
        raise TrainingError(_explain(run, gone))


def set_aside(run: Folder, is_registered: Callable[[Folder], bool]) -> list[Folder]:
    """Move evaluations and exports of steps to a folder `before-N`, where there are any. Returns where they are now.

    Raises:
        TrainingError: where a registered version would lose its files; nothing is moved then.
    """
    exports = run / "export"
    if versions := [name for name in exports.list() if is_registered(exports / name)]:
        raise TrainingError(
            f"{exports / versions[0]} is a version in the registry, whose files a training from step 0 would replace; "
            "give the job another name"
        )
    stale = [name for name in OF_A_TRAINING if any(map(parse_step, (run / name).list()))]
    number = 1 + sum(name.startswith("before-") for name in run.list())
    moved = []
    for name in stale:
        target = run / f"before-{number}" / name
        target.path.parent.mkdir(exist_ok=True)
        (run / name).path.rename(target.path)
        moved.append(target)
    return moved


def _goes_on(run: Run) -> bool:
    """Whether there are checkpoints, also where all are damaged: who chooses one tells that."""
    retrying(run.checkpoints.refresh, f"looking at {run.checkpoints}")
    return bool(committed_steps(run.checkpoints)) or has_begun(run.checkpoints, run.job.checkpoint.start_over)


def _gone(run: Run) -> list[CheckpointEvent]:
    """Commits of the log, but for those from before the run was begun anew or cleaned by a sweep."""
    since = float(run.folder.read_json(CLEANED).get("time", time.time())) if run.folder.exists(CLEANED) else 0.0
    return [event for event in read_events(run.folder) if isinstance(event, CheckpointEvent) and event.time > since]


def _explain(run: Run, gone: Sequence[CheckpointEvent]) -> str:
    last = gone[-1]
    when = datetime.fromtimestamp(last.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    usual = run.folder / "checkpoints"
    there = committed_steps(usual) if str(usual) != str(run.checkpoints) else []
    where = (
        f"{usual} holds steps {', '.join(map(str, there))}"
        if there
        else "they were deleted or moved, or it was another place"
    )
    return (
        f"{run.checkpoints} holds no checkpoint, but {len(gone)} were committed, the last of step {last.step} at "
        f"{when}: {where}. Training would begin at step 0: put them back, set "
        "checkpoint.storage as it was, or say checkpoint.start_over=true to begin anew"
    )
