"""Models named by hub id: downloaded once, into storage, where every node and every later command finds them.

A folder appears there whole or not at all; a download that was interrupted goes on. What is there is never asked of the
hub again, so that a job goes on with the weights it began with although the branch has moved. Begin at `hub_folder`.
"""

import shutil
from pathlib import Path
from typing import Any

import xxhash

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.storage import Folder

FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")
CODE = "*.py"


def hub_folder(job: Job, name: str, field: str, revision: str | None = None, only: tuple[str, ...] = ()) -> Path:
    """The folder of a hub model.

    Args:
        name: its hub id.
        field: of the job, for messages.
        only: patterns of the files to have; by default weights in safetensors, settings, the tokenizer, and code where
            the job trusts it.

    Raises:
        JobError: where it cannot be found.
    """
    wanted = only or (*FILES, *((CODE,) if job.model.trust_remote_code else ()))
    storage = Folder(job.storage)
    try:
        if not storage.is_local:  # shards alone can be there, which this process writes
            return _snapshot(name, revision, wanted)
        key = xxhash.xxh3_64_hexdigest(f"{name} {revision} {wanted}".encode())
        return _keep(name, revision, wanted, storage.path / "models" / f"{name.replace('/', '--')}-{key}")
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean: not available
        raise JobError(
            f"{field}: {name!r} (revision {revision or 'main'}) is neither a folder here nor a model on the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Check the spelling, the "
            "network, or HF_TOKEN for gated models"
        ) from error


def _keep(name: str, revision: str | None, wanted: tuple[str, ...], target: Path) -> Path:
    """Have a model in `target`; of several processes that want it one downloads."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # waits, also where flock is unknown

    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f".tmp-{target.name}.lock")):
        if not target.is_dir():
            _fill(name, revision, wanted, target.with_name(f".tmp-{target.name}")).rename(target)
    return target


def _fill(name: str, revision: str | None, wanted: tuple[str, ...], partial: Path) -> Path:
    """Download into a folder beside `partial`; without a network what the user's own cache holds is copied there."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception:
        try:
            held = _snapshot(name, revision, wanted, offline=True)
        except Exception:
            held = None
        if held is None:
            raise
        return Path(shutil.copytree(held, partial, dirs_exist_ok=True))
    return _snapshot(name, commit, wanted, into=partial.with_name(f"{partial.name}-{commit}"))


def _snapshot(
    name: str, revision: str | None, wanted: tuple[str, ...], into: Path | None = None, offline: bool = False
) -> Path:
    """All wanted files in a folder, or in the user's own cache; what that cache holds is copied, not downloaded."""
    from huggingface_hub import snapshot_download

    place: dict[str, Any] = {"revision": revision, "local_dir": into, "local_files_only": offline}
    place |= {"allow_patterns": list(wanted), "ignore_patterns": ["consolidated*"]}  # as `weight_files` has them
    return Path(snapshot_download(name, **place))
