"""Which run a command means: a job file, a run's name (or the start of it), or its folder; every command asks here."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from orchestrator.report.index import INDEX
from trainers.errors import JobError
from trainers.job.load import load_job, parse_job
from trainers.job.schema import Job
from trainers.run.events import EVENTS
from trainers.run.folder import RESULT, SHARDS
from trainers.run.lock import LOCK
from trainers.storage import Folder, is_remote

JOB_FILE = "job.yaml"
RAN = (EVENTS, LOCK, RESULT, SHARDS, "evals", "checkpoints", "export")
"""What a run folder has beside its job, one or the other."""


def find_folder(run: str, storage: str = "runs", overrides: Sequence[str] = ()) -> Folder:
    """The folder of the run that is meant.

    Args:
        run: a job file, a run's name or its folder.
        storage: where a name is looked for.
        overrides: of the job file.

    Raises:
        JobError: where there is no such run, or a name fits several.
    """
    if job_file := job_file_of(run):
        return _folder_of_job(load_job(job_file, overrides), str(job_file))
    if is_remote(run) or "/" in run.rstrip("/") or (Path(run) / JOB_FILE).exists():
        folder = Folder(run.rstrip("/") if is_remote(run) else str(Path(run).absolute()))
        if folder.exists(JOB_FILE):
            return folder
        raise JobError(f"{folder} is not a run folder: it {'has no job.yaml' if folder.exists() else 'does not exist'}")
    return _folder_of_name(run.rstrip("/"), runs_folder(storage))


def job_file_of(run: str) -> Path | None:
    """The job file that is named, or that of a folder as `tuneyard init` writes it; None where a run is meant."""
    path = Path(run)
    if path.is_file():
        return path
    job_file = path / JOB_FILE
    ran = any((path / name).exists() for name in RAN)
    return job_file if job_file.is_file() and not ran else None


def find_job(run: str, storage: str = "runs", overrides: Sequence[str] = ()) -> tuple[Job, Folder]:
    """The resolved job of a run, and its folder. Raises JobError as `find_folder` does."""
    folder = find_folder(run, storage, overrides)
    if folder.is_local:
        return load_job(folder.path / JOB_FILE, overrides), folder
    if overrides:
        raise JobError(f"--set cannot change the job of {folder}: name the job file instead")
    return parse_job(yaml.safe_load(folder.read_bytes(JOB_FILE)), f"{folder}/{JOB_FILE}"), folder


def runs_folder(storage: str) -> Folder:
    """The runs of a storage. Raises JobError where it does not exist."""
    if not Folder(storage).exists():
        raise JobError(f"no folder {storage}: name the storage of the job with --storage, or give the job file")
    return Folder(storage) / "runs"


def run_names(runs: Folder) -> list[str]:
    """Names of run folders; the page that lists them lies beside them."""
    return [name for name in runs.list() if name != INDEX]


def choose_names(name: str, runs: Folder) -> list[str]:
    """Names of runs that a name or the start of one means. Raises JobError where there are none."""
    names = [known for known in run_names(runs) if (runs / known).list()]
    chosen = [known for known in names if known == name] or [known for known in names if known.startswith(name)]
    if not chosen:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
        raise JobError(f"no run {name!r} in {runs}; " + (f"there are: {', '.join(near)}" if near else "it is empty"))
    return chosen


def _folder_of_name(name: str, runs: Folder) -> Folder:
    chosen = choose_names(name, runs)
    if len(chosen) > 1:
        raise JobError(f"{name!r} fits several runs in {runs}: {', '.join(chosen)}; give more of the name")
    return runs / chosen[0]


def _folder_of_job(job: Job, where: str) -> Folder:
    runs = Folder(job.storage) / "runs"
    names = [name for name in run_names(runs) if name.rpartition("-")[0] == job.name and (runs / name).exists(JOB_FILE)]
    same = [name for name in names if _identity(runs / name) == job.identity()]
    if len(same) == 1:
        return runs / same[0]
    if same:
        raise JobError(f"{where} has several runs, on other data or another model: {', '.join(same)}; name one of them")
    others = f"; runs with other settings: {', '.join(names)}" if names else ""
    raise JobError(f"{where} has no run in {runs} yet: `tuneyard run {where}` starts one{others}")


def _identity(folder: Folder) -> str | None:
    try:
        return parse_job(yaml.safe_load(folder.read_bytes(JOB_FILE))).identity()
    except (JobError, yaml.YAMLError, AttributeError):
        return None
