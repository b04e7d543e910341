"""`tuneyard gc`: what lies in a storage that nothing refers to any more, and its removal. Begin at `find_garbage`.

Never taken: a run folder, its record, evaluations and logs; registered and champions' exports (`tuneyard registry gc`
weighs those); the best, the registered and the newest checkpoint; anything of a run that has not ended or is at work;
downloaded models; whatever was used within the age that is asked for. A doubt keeps a thing, and is told.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from orchestrator.commands.find_run import run_names
from orchestrator.commands.status import lock_is_held
from orchestrator.registry.mlflow_client import registry_uri
from orchestrator.registry.read import find_model, named_folders, place_of
from trainers.checkpoint.cleaning import take_away
from trainers.checkpoint.reading import committed_steps
from trainers.errors import JobError, TuneyardError
from trainers.job.load import load_job
from trainers.records import Record
from trainers.run.events import EVENTS
from trainers.run.folder import JOB_FILE, SHARDS, RunResult, checkpoints_folder, parse_step, read_result, step_name
from trainers.run.lock import LOCK, own_folder
from trainers.storage import TEMPORARY, Folder, is_remote

DAY_S = 86400.0


class Garbage(Record):
    """One thing that may go."""

    kind: Literal["shards", "export", "checkpoint", "leftover"]
    path: str
    bytes: int
    """On disk; a file with several names counts for each."""
    why: str
    run: str | None = None
    """The folder of the run that it belongs to."""


class Found(Record):
    """What may go, and what was kept because it could not be told."""

    garbage: tuple[Garbage, ...]
    kept: tuple[str, ...]


def find_garbage(storage: str, older_s: float, checkpoints: bool) -> Found:
    """Look through a storage.

    Args:
        storage: a folder; a bucket does not tell when its files were last used.
        older_s: seconds for which a thing must not have been used or changed.
        checkpoints: also checkpoints of runs that are done, but for the best, the registered and the newest.

    Raises:
        JobError: no such folder, or a bucket.
    """
    if is_remote(storage):
        raise JobError(
            f"--storage {storage}: gc works on folders, for a bucket does not tell when a file was last used"
        )
    folder = Path(storage.removeprefix("file://")).resolve()
    if not folder.is_dir():
        raise JobError(f"no folder {folder}: name the storage of the jobs with --storage")
    runs = Folder(str(folder)) / "runs"
    kept: list[str] = []
    found = [*_shards(runs, kept), *_leftovers(runs)]
    for name in run_names(runs):
        found += _of_run(runs / name, checkpoints, kept)
    old = [one for one in found if time.time() - _last_change(Path(one.path)) > older_s]
    return Found(garbage=tuple(old), kept=tuple(kept))


def delete(garbage: Collection[Garbage]) -> list[str]:
    """Delete things that `find_garbage` found. Returns those that stayed, because their run is at work by now."""
    stayed = []
    for one in garbage:
        try:
            if one.run is None:
                _remove(Path(one.path))
                continue
            with own_folder(Folder(one.run)):
                _remove(Path(one.path))
        except JobError as error:
            stayed.append(f"{one.path}: {error}")
    return stayed


def show_garbage(found: Found, deleted: bool) -> None:
    """A line a thing, the largest first, and what was kept in doubt."""
    for one in sorted(found.garbage, key=lambda one: -one.bytes):
        print(f"{one.bytes / 2**20:10,.1f} MiB  {one.kind}  {one.path}  ({one.why})")
    size = f"{sum(one.bytes for one in found.garbage) / 2**20:,.1f} MiB"
    done = f"deleted {size}" if deleted else f"{size} to delete with --yes"
    print(done if found.garbage else "nothing to delete")
    for line in found.kept:
        print(f"kept  {line}")


def _shards(runs: Folder, kept: list[str]) -> Iterator[Garbage]:
    """Sets that no run was trained or evaluated on."""
    shards, used = runs.parent / "shards", set[str]()
    for name in run_names(runs):
        run = runs / name
        if run.exists(SHARDS):
            used |= set(run.read_json(SHARDS))
        elif {JOB_FILE, EVENTS, LOCK} & set(run.list()):
            kept.append(
                f"all shards: {run} is of an earlier version, which did not note its own; start it again, or delete it"
            )
            return
    for name in shards.list():
        if name not in used:
            yield _garbage("shards", shards / name, "no run of this storage uses them")


def _of_run(run: Folder, checkpoints: bool, kept: list[str]) -> Iterator[Garbage]:
    """Exports that are not registered and, where asked for, checkpoints, of a run that is done and not at work."""
    try:
        result = read_result(run)
    except ValueError:
        result = None
    if result is None or result.status != "done" or result.registry is None or lock_is_held(run) is not False:
        return
    try:
        job = load_job(run.path / JOB_FILE)
        uri = registry_uri(job.storage, job.registry.uri)
        sources = {place_of(version.source) for version in find_model(uri, result.registry.model).versions.values()}
        sources |= named_folders(uri).keys()
    except TuneyardError as error:
        kept.append(f"exports and checkpoints of {run}: {str(error).splitlines()[0]}")
        return
    exports = run / "export"
    for name in exports.list():
        if place_of(str(exports / name)) not in sources and parse_step(name) not in _chosen(result):
            yield _garbage("export", exports / name, "its step is not registered", run)
    folder = checkpoints_folder(job, run)
    if checkpoints and folder.is_local:
        steps = committed_steps(folder)
        for step in set(steps[:-1]) - _chosen(result):
            yield _garbage(
                "checkpoint", folder / step_name(step), "not the best, nor the newest, of a run that is done", run
            )


def _chosen(result: RunResult) -> set[int | None]:
    """Steps that stay whatever else goes."""
    best = (result.best or {}).get("step")
    return {result.registry.step if result.registry else None, int(str(best)) if best is not None else None}


def _leftovers(runs: Folder) -> Iterator[Garbage]:
    """What writers that were killed left behind under temporary names."""
    root = runs.parent.path
    for pattern in ("", "runs/", "shards/", "models/", "models/digests/", "verify/", "runs/*/export/*/"):
        for path in sorted(root.glob(f"{pattern}{TEMPORARY}*")):
            yield _garbage("leftover", Folder(str(path)), "temporary, left by a command that was killed")


def _garbage(kind: Literal["shards", "export", "checkpoint", "leftover"], folder: Folder, why: str,
             run: Folder | None = None) -> Garbage:  # fmt: skip
    size = sum(stat.st_size for stat in _stats(folder.path))
    return Garbage(kind=kind, path=str(folder.path), bytes=size, why=why, run=str(run) if run else None)


def _last_change(path: Path) -> float:
    """When anything in it was written or used last, in seconds since 1970."""
    return max((stat.st_mtime for stat in _stats(path)), default=0.0)


def _stats(path: Path) -> Iterator[os.stat_result]:
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            yield each.stat()


def _remove(path: Path) -> None:
    """Out of sight as a whole first, so that nobody meets a half of it."""
    if path.name.startswith(TEMPORARY):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif path.exists():
        take_away(Folder(str(path)))()
