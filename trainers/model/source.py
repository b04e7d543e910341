"""Turns `model.path` into a local Hugging Face folder with safetensors and a tokenizer, and gives it a digest.

A hub id is downloaded once (see `hub.py`); a GGUF file is dequantized once into storage, because a GGUF model is
not partitioned while it loads under ZeRO-3. Weights in pickle files are refused.
"""

import contextlib
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.job.task_fields import names_folder
from trainers.model.gguf_base import dequantize
from trainers.model.hub import hub_folder
from trainers.pretrained import weight_files
from trainers.storage import Folder
from trainers.tokenizer.encoder import tokenizer_files
from trainers.tokenizer.stand_in import with_stand_in

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelFolder:
    """A model ready for from_pretrained."""

    path: str
    digest: str
    """Of config, tokenizer, every byte of the weights, and of code that is trusted; of a teacher's too, where the job
    learns from one. Part of the run's identity."""
    stand_in: bool = False
    """Whether it has no tokenizer of its own: what it says of tokens is about right, and nothing may be trained."""


def prepare_model(job: Job, weights: bool = True) -> ModelFolder:
    """Download or convert where needed. Calling it again does nothing twice.

    Args:
        weights: whether a folder without weights is refused; a plan needs the configuration alone, and gets a tokenizer
            that stands in where there is none.

    Raises:
        JobError: where there is no such model, or it cannot be used.
    """
    source = _source(job)
    if job.model.gguf_file is not None:
        source = _convert_gguf(job, source)
    found = _checked(source, job, weights)
    if weights or tokenizer_files(source):
        return found
    return replace(_checked(with_stand_in(source), job, weights), stand_in=True)


def find_model(job: Job) -> ModelFolder | None:
    """The prepared model, or None where `prepare_model` has not been called yet for a GGUF model."""
    source = _source(job)
    if job.model.gguf_file is not None:
        source = _gguf_target(job, source)
        if not source.is_dir():
            return None
    return _checked(source, job)


def _source(job: Job) -> Path:
    path, gguf_file = Path(job.model.path), job.model.gguf_file
    if not names_folder(job.model.path):
        return hub_folder(
            job, job.model.path, "model.path", job.model.revision, (gguf_file, "*.json") if gguf_file else ()
        )
    if not path.is_dir():
        raise JobError(f"model.path: no folder {path}; name a folder with config.json and safetensors, or a hub id")
    if gguf_file is not None and not (path / gguf_file).is_file():
        found = sorted(item.name for item in path.glob("*.gguf")) or "none"
        raise JobError(f"model.gguf_file: no {gguf_file} in {path}; GGUF files there: {found}")
    return path


def find_teacher(job: Job) -> str | None:
    """The folder of the model that the job learns from; None where it has no teacher.

    Raises:
        JobError: where there is no such model.
    """
    if job.train.distill is None:
        return None
    name, field = job.train.distill.teacher, "train.distill.teacher"
    if not names_folder(name):
        return str(hub_folder(job, name, field))
    if not (Path(name) / "config.json").is_file():
        raise JobError(f"{field}: {name} is no model folder: it has no config.json")
    return name


def _checked(path: Path, job: Job, needs_weights: bool = True) -> ModelFolder:
    if not (path / "config.json").is_file():
        raise JobError(f"model.path: {path} has no config.json, so it is not a Hugging Face model folder")
    weights = weight_files(path)
    pickles = sorted(item.name for pattern in ("*.bin", "*.pt", "*.gguf") for item in path.glob(pattern))
    if not weights and (needs_weights or pickles):
        found = f" ({', '.join(pickles)} found: pickles are never loaded, a GGUF file needs model.gguf_file)"
        raise JobError(f"model.path: {path} has no safetensors weights{found if pickles else ''}")
    digest = xxhash.xxh3_128(str(job.model.trust_remote_code).encode())
    teacher = find_teacher(job)
    for folder in (path, Path(teacher)) if teacher else (path,):
        _add_content(digest, folder, job)
    return ModelFolder(str(path), digest.hexdigest())


def _add_content(digest: xxhash.xxh3_128, path: Path, job: Job) -> None:
    for name in ("config.json", *tokenizer_files(path)):
        digest.update(name.encode() + (path / name).read_bytes())
    cache = Folder(job.storage) / "models" / "digests"
    for file in [*weight_files(path), *(sorted(path.glob("*.py")) if job.model.trust_remote_code else ())]:
        digest.update(file.name.encode() + _digest(file, cache).encode())


def _digest(path: Path, cache: Folder) -> str:
    """Digest of every byte of a file, read once for each size and time of change: 140 GB take minutes."""
    stat = path.stat()
    name = xxhash.xxh3_128_hexdigest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    with contextlib.suppress(OSError):
        return cache.read_bytes(name).decode()
    hasher = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            hasher.update(block)
    with contextlib.suppress(OSError):  # without a cache it is read again the next time
        cache.write_bytes(name, hasher.hexdigest().encode())
    return str(hasher.hexdigest())


def _gguf_target(job: Job, source: Path) -> Path:
    storage = Folder(job.storage)
    if not storage.is_local:
        raise JobError(
            f"model.gguf_file: convert the model to safetensors first; storage {storage} is not a local folder"
        )
    assert job.model.gguf_file is not None
    cache = storage / "models" / "digests"
    name = f"{Path(job.model.gguf_file).stem}-{_digest(source / job.model.gguf_file, cache)[:16]}"
    return storage.path / "models" / name


def _convert_gguf(job: Job, source: Path) -> Path:
    """Dequantize to fp32 safetensors; the folder appears whole or not at all."""
    target = _gguf_target(job, source)
    if target.is_dir():
        return target
    partial = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        dequantize(source, str(job.model.gguf_file), partial)
        os.sync()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
