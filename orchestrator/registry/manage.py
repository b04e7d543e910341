"""The registry by hand: promote, roll back, verify, collect. Every call can be repeated after a kill at any point.

The versions that held the alias champion stand in the model's tag CHAMPIONS, oldest first; the last one is who should
hold it now. A promotion writes the tag, then the alias: at once in SQLite; on a server a rerun that finds the tag
written sets the alias alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml

from orchestrator.registry.digests import digest_file
from orchestrator.registry.mlflow_client import explain_failures, sqlite_path
from orchestrator.registry.promotion import Promotion, baselines_of, decide
from orchestrator.registry.read import (
    CHAMPION,
    COLLECTED,
    ModelVersion,
    StoredModel,
    champion,
    find_model,
    named_folders,
    place_of,
    row_scores_of,
    show_model,
)
from orchestrator.registry.tables import Writer, open_writer
from trainers.checkpoint.records import FileRecord
from trainers.errors import JobError
from trainers.job.load import parse_job
from trainers.records import Record
from trainers.run.lock import hold
from trainers.run.row_scores import read_labels
from trainers.storage import Folder
from trainers.tasks import choose_metric, load_task
from trainers.tasks.options import task_options

CHAMPIONS = "tuneyard.champions"


class FileCheck(Record):
    """One file of a registered model folder, computed again."""

    file: str
    state: str
    """ok, or what is wrong with it."""


class Collected(Record):
    """One version whose files `collect` deletes."""

    version: int
    folder: str
    bytes: int


@contextmanager
def registry_lock(uri: str) -> Iterator[None]:
    """Keep other processes of this program from deciding at the same time; a tracking server has no lock to take."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        hold(lock, Folder(str(path.parent)), wait=True)
        yield


def pick_version(uri: str, name: str, version: str | None = None) -> ModelVersion:
    """A version by its number, or by the alias champion, which is the default.

    Raises:
        JobError: for an unknown model or version.
    """
    versions = show_model(uri, name)
    wanted = (version or CHAMPION).removeprefix("v")
    for one in versions:
        if wanted == str(one.version) or (wanted == CHAMPION and one.champion):
            return one
    known = ", ".join(str(one.version) for one in versions)
    raise JobError(f"{name} has no version {wanted!r}; there are {known or 'none'}")


def promote(uri: str, version: ModelVersion) -> None:
    """Make a version the champion. Raises JobError where its files were deleted."""
    with explain_failures(uri), registry_lock(uri):
        model = find_model(uri, version.model)
        if COLLECTED in model.versions[version.version].tags:
            raise JobError(
                f"the files of {version.model} version {version.version} were deleted by `registry gc`, or replaced "
                "when its run was trained anew"
            )
        with open_writer(uri) as registry:
            crown(registry, model, version.version)


def crown(registry: Writer, model: StoredModel, version: int) -> None:
    """Give the alias to a version and note it in the history. The caller holds the lock."""
    history = champions(model)
    if history[-1:] != [version]:
        _note(registry, model.name, [*history, version])
    if model.aliases.get(CHAMPION) != version:
        registry.set_registered_model_alias(model.name, CHAMPION, str(version))


def champions(model: StoredModel) -> list[int]:
    """Versions that held the alias, oldest first; the last is who should hold it now."""
    return [int(number) for number in json.loads(model.tags.get(CHAMPIONS, "[]")) if int(number) in model.versions]


def rollback(uri: str, name: str) -> int:
    """Give the alias back to the champion before. Returns its version. Raises JobError where there was none."""
    with explain_failures(uri), registry_lock(uri):
        model = find_model(uri, name)
        history, standing = champions(model), model.aliases.get(CHAMPION)
        if standing in history:  # else an earlier rollback was killed between its two writes
            history = history[: history.index(standing)]
        usable = [number for number in history if COLLECTED not in model.versions[number].tags]
        if not usable:
            raise JobError(f"{name} has no champion before version {standing} to go back to")
        with open_writer(uri) as registry:
            _note(registry, name, usable)
            registry.set_registered_model_alias(name, CHAMPION, str(usable[-1]))
        return usable[-1]


def weigh_versions(uri: str, candidate: ModelVersion) -> Promotion:
    """Whether a version would become champion by rule `if_better`, from the evaluation rows of both."""
    job = parse_job(yaml.safe_load(candidate.lineage["job"]))
    task, rows, standing = (
        load_task(job.task, task_options(job)),
        row_scores_of(candidate),
        champion(uri, candidate.model),
    )
    task.labels = tuple(read_labels(Folder(candidate.run), candidate.step))
    metric, mode = choose_metric(job)
    if metric in job.evaluate.metrics:  # code that a registry names is not run
        reason = f"{metric} is the job's own metric, whose code is not run from a registry; promote it by hand"
        return Promotion(promote=False, reason=f"not promoted: {reason}")
    baselines = baselines_of(Folder(candidate.run), rows, task, job.train.seed)
    before = row_scores_of(standing) if standing else None
    return decide("if_better", rows, before, task, metric, mode, job.train.seed, baselines)


def verify_files(version: ModelVersion) -> list[FileCheck]:
    """Compute the digest of every file of a version again, and compare it with the one that was registered."""
    folder = Folder(version.source)
    checks = [FileCheck(file=name, state=_state(folder, name, known)) for name, known in version.files.items()]
    added = sorted(set(folder.list()) - set(version.files))
    return checks + [FileCheck(file=name, state="was not registered") for name in added]


def collect(uri: str, name: str, keep: int, delete: bool) -> list[Collected]:
    """Files of versions that nobody needs: not the champion's, the one before it, nor the newest `keep`; and no folder
    that another version names which stays, of this model or another.

    Args:
        keep: newest versions whose files stay.
        delete: else they are only listed.
    """
    with explain_failures(uri), registry_lock(uri):
        model = find_model(uri, name)
        needed = {
            model.aliases.get(CHAMPION),
            *champions(model)[-2:],
            *sorted(model.versions)[len(model.versions) - keep :],
        }
        gone = [version for version in model.ours() if version.version not in needed and Folder(version.source).list()]
        gone = [version for version in gone if version.source.startswith(f"{version.run.rstrip('/')}/export/")]
        named, doomed = named_folders(uri), {(name, version.version) for version in gone}
        gone = [
            version
            for version in gone
            if {(model, one.number) for model, one in named.get(place_of(version.source), ())} <= doomed
        ]
        collected = [
            Collected(version=version.version, folder=version.source, bytes=_bytes(version.files)) for version in gone
        ]
        if delete:
            for version in gone:
                with open_writer(uri) as registry:  # written down before anything is deleted
                    registry.set_model_version_tag(name, str(version.version), COLLECTED, "true")
                Folder(version.source).delete()
        return collected


def _bytes(files: dict[str, FileRecord]) -> int:
    return sum(file.bytes for file in files.values())


def _state(folder: Folder, name: str, registered: FileRecord) -> str:
    try:
        present = digest_file(folder, name)
    except OSError:
        return "is missing"
    if present.bytes != registered.bytes:
        return f"has {present.bytes:,} bytes, registered with {registered.bytes:,}"
    return "ok" if present == registered else f"digest {present.digest}, registered with {registered.digest}"


def _note(registry: Writer, name: str, history: Sequence[int]) -> None:
    registry.set_registered_model_tag(name, CHAMPIONS, json.dumps(list(history)[-100:]))
