"""Begins a run from another run's committed checkpoint (`train.continue_from`). Begin at `begin_from_parent`.

The first checkpoint of such a run is its parent's under another name: the same files, hard-linked where one file system
holds both, and a state that says whose it is now. So the parent's own cleaning takes nothing away, and the ranks check
every file against the digests that the parent committed, as they do with any checkpoint.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from trainers.checkpoint.cleaning import ASIDE
from trainers.checkpoint.damage import Damaged, read_manifest
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.records import (
    COMMITTED,
    MANIFEST,
    QUARANTINED,
    STATE,
    CheckpointManifest,
    CheckpointState,
    FileRecord,
)
from trainers.errors import JobError, TrainingError
from trainers.job.load import parse_job, parse_yaml
from trainers.job.schema import Job
from trainers.run.continued import CONTINUED, Ancestor, Line, changed_fields, read_line, refusal
from trainers.run.events import CheckpointEvent, StartEvent, read_events
from trainers.run.folder import JOB_FILE, checkpoints_folder, parse_step, run_folder, step_name
from trainers.run.record import Run
from trainers.shards.manifest import Shards
from trainers.storage import Folder
from trainers.training.divergence import SkippedSteps, read_skipped, write_skipped

COPY_BYTES = 1 << 24
POLL_S = 1.0


@dataclass(frozen=True)
class Parent:
    """The run that another goes on from, and what that one has otherwise."""

    job: Job
    folder: Folder
    checkpoint: Folder
    digest: str
    changed: dict[str, tuple[Any, Any]]


def find_parent(job: Job) -> Parent:
    """The run and checkpoint that `train.continue_from` names.

    Raises:
        JobError: where they are not there, or the job differs from the other in what cannot change, with all problems.
    """
    asked = job.train.continue_from
    assert asked is not None
    folder = Folder(asked.run)
    try:
        before = parse_job(parse_yaml(folder.read_bytes(JOB_FILE).decode()), f"{asked.run}/{JOB_FILE}")
    except (FileNotFoundError, NotADirectoryError):
        said = f"train.continue_from.run: {asked.run} holds no {JOB_FILE}; name the folder of a run"
        raise JobError(said) from None
    changed = changed_fields(before, job)
    problems = [f"{field}: {now!r}, but {was!r} in the run of train.continue_from: {why}"
                for field, (was, now) in changed.items() if (why := refusal(field))]  # fmt: skip
    problems += _length_problems(folder, before, changed, asked.step)
    checkpoints = checkpoints_folder(before, folder)
    checkpoint, digest = checkpoints / step_name(asked.step), ""
    if asked.step not in (committed := committed_steps(checkpoints)):
        there = ", ".join(map(str, committed)) or "none"
        problems.append(f"train.continue_from.step: {asked.step} is not committed in {asked.run}; there are: {there}")
    else:
        digest = checkpoint.read_bytes(COMMITTED).decode()
        if asked.digest not in (None, digest):
            problems.append(f"train.continue_from.digest: {asked.digest}, but step {asked.step} of {asked.run} is "
                            f"{digest}: it was trained again since")  # fmt: skip
    if problems:
        raise JobError(problems)
    return Parent(before, folder, checkpoint, digest, changed)


def _length_problems(folder: Folder, before: Job, changed: dict[str, Any], step: int) -> list[str]:
    """Nothing is left to train, or the step was the last and may have been cut short: its rows would be told wrong."""
    steps = max((event.steps or 0 for event in read_events(folder) if isinstance(event, StartEvent)), default=0)
    if not steps or step < steps:
        return []
    if not {"train.epochs", "train.steps"} & changed.keys():
        return [f"train.continue_from.step: {step} is the last step of the training, so nothing is left; give more "
                "train.epochs or train.steps, or an earlier step"]  # fmt: skip
    if before.train.epochs is not None:
        return [f"train.continue_from.step: {step} is the last step of {before.train.epochs:g} epochs and may hold "
                "fewer rows than the others; name an earlier step"]  # fmt: skip
    return []


def check_same_ground(parent: Parent, model_digest: str, shards: Shards) -> None:
    """Raises JobError where the model's files or the rows are no longer what the parent was trained with."""
    expected = run_folder(parent.job, model_digest, shards).name
    if parent.folder.name != expected:
        raise JobError(
            f"train.continue_from.run: with the model's files and the rows as they are now, that job's run is "
            f"{expected} and not {parent.folder.name}: they have changed since, or the folder was renamed"
        )


def begin_from_parent(run: Run, steps: int, alive: Callable[[], None] = lambda: None) -> CheckpointEvent | None:
    """Give a run that has no checkpoint yet the one that its job names. One process's work: rank 0, or a sweep.

    Args:
        steps: of the whole training.
        alive: called again and again while files are copied.

    Returns:
        the commit of its first checkpoint; None where it has one already, or its own are damaged.

    Raises:
        JobError: as `find_parent` and `check_same_ground`.
        TrainingError: where the parent's checkpoint is damaged.
    """
    asked = run.job.train.continue_from
    if asked is None or has_begun(run.checkpoints, run.job.checkpoint.start_over):
        return None
    parent = find_parent(run.job)
    check_same_ground(parent, run.model.digest, run.shards)
    if asked.step >= steps:
        raise JobError(f"train.continue_from.step: {asked.step}, but the training has {steps} steps: nothing is left")
    ancestor = Ancestor(run=parent.folder.name, step=asked.step, digest=parent.digest, changed=parent.changed)
    line = Line(ancestors=(*read_line(parent.folder), ancestor))
    run.folder.write_bytes(CONTINUED, line.model_dump_json(indent=1).encode())
    skipped = tuple(one for one in read_skipped(parent.folder).steps if one.step < asked.step)
    if skipped:  # they made no update: the optimizer has counted fewer
        write_skipped(run.folder, SkippedSteps(steps=skipped))
    return _adopt(parent, run.checkpoints / step_name(asked.step), run.job.identity(), alive)


def wait_for_parent(run: Run) -> None:
    """Until `begin_from_parent` is done, which another rank does. In no collective: their time is limited, and a copy
    of a large checkpoint may take longer. Where that rank fails, the launcher ends this one."""
    while run.job.train.continue_from and not has_begun(run.checkpoints, run.job.checkpoint.start_over):
        time.sleep(POLL_S)
        run.checkpoints.refresh()


def has_begun(checkpoints: Folder, start_over: bool = False) -> bool:
    """Whether a run has checkpoints of its own; where all were set aside as damaged, unless it may start over."""
    aside = False
    for name in checkpoints.list():
        if parse_step(name.removeprefix(ASIDE)) is None:
            continue
        names = (checkpoints / name).list()
        if QUARANTINED in names or name.startswith(ASIDE):
            aside = True
        elif MANIFEST in names:
            return True
    return aside and not start_over


def _adopt(parent: Parent, target: Folder, job: str, alive: Callable[[], None]) -> CheckpointEvent:
    """The parent's checkpoint as one of another job: every file but the state that names the job, then the commit."""
    try:
        files = dict(read_manifest(parent.checkpoint).files)
        data = parent.checkpoint.read_bytes(STATE)
        if xxhash.xxh3_128_hexdigest(data) != files[STATE].digest:
            raise Damaged(f"{STATE} does not match its digest")
    except Damaged as damaged:
        raise TrainingError(f"train.continue_from: {parent.checkpoint} is damaged: {damaged}") from None
    target.delete()  # what a start that was killed had linked
    for name in files:
        if name != STATE:
            _link_or_copy(parent.checkpoint, target, name, alive)
    state = CheckpointState.model_validate_json(data).model_copy(update={"job": job})
    files[STATE] = _write(target, STATE, state.model_dump_json(indent=1).encode())
    manifest = _write(target, MANIFEST, CheckpointManifest(files=files).model_dump_json(indent=1).encode())
    target.write_bytes(COMMITTED, manifest.digest.encode())
    return CheckpointEvent(step=state.step, bytes=sum(file.bytes for file in files.values()))


def _write(folder: Folder, name: str, data: bytes) -> FileRecord:
    folder.write_bytes(name, data)
    return FileRecord(bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))


def _link_or_copy(source: Folder, target: Folder, name: str, alive: Callable[[], None]) -> None:
    """One file of a committed checkpoint, which nobody changes: a second name for it where that is possible."""
    if source.is_local and target.is_local:
        target.path.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.path / name, target.path / name)
            return
        except OSError:  # another file system, or one without links
            pass
    with source.open_input(name) as stream, target.open_output(name) as copy:
        while chunk := stream.read_buffer(COPY_BYTES):
            copy.write(chunk)
            alive()
