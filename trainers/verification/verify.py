"""Runs the checks on a job and keeps the result by what it depends on. Begin at `verify_job`.

The result stands under storage/verify/, keyed by the digest of model, attention backend, task, packing and library
versions, so that a launch asks again only after one of them changed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainers.errors import TrainingError
from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.records import Record
from trainers.storage import Folder
from trainers.verification.checks import CHECKS, Finding
from trainers.verification.precision import bf16_follows
from trainers.verification.sample import CheckContext, make_context, weight_bytes

BF16 = "bf16"
SMALL_BYTES = 20 * 2**20
"""Weights below which several threads only wait for one another."""
PACKING_CHECKS = ("isolation", "packed_as_separate", "cut_of_step")
"""Checks that can fail because documents share a sequence."""
VERSION = 3
"""Raised whenever a check changes."""


class CheckResult(Record):
    """One check."""

    name: str
    passed: bool
    detail: str
    seconds: float
    error: bool = False
    """Whether the check itself broke, so that nothing is known of what it looks at."""


class Verification(Record):
    """What the checks said of a model, a task and an attention backend."""

    schema_version: int = 1
    key: str
    task: str
    attention: str
    packing: bool
    checks: tuple[CheckResult, ...]
    layers: int | None = None
    """Layers of the model that were looked at; None: all."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)


def verification_key(job: Job, model: ModelFolder) -> str:
    """What a result depends on."""
    libraries = [version(name) for name in ("torch", "transformers")]
    parts = [VERSION, model.digest, job.model.attention, job.task, job.packing, job.train.objective, *libraries]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def verify_job(job: Job, model: ModelFolder, again: bool = False) -> Verification:
    """Check a job's model on a few of its rows, or read what was found before.

    Args:
        again: check even where a result is kept.

    Raises:
        DataError: where no row can be used.
    """
    if not again and (kept := read_verification(job, model)) is not None:
        return kept
    import torch

    key = verification_key(job, model)
    with _quick_threads(model.path), tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        context = make_context(job, model.path, Path(scratch), _device())
        attention = str(context.model.config._attn_implementation)
        found = Verification(key=key, task=job.task, attention=attention, packing=job.packing,
                             checks=run_checks(context), layers=context.layers)  # fmt: skip
        del context
    if torch.cuda.is_available():  # the training's own peak is what counts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not any(check.error for check in found.checks):  # what could not be looked at is looked at again
        _folder(job).write_bytes(f"{key}.json", found.model_dump_json(indent=1).encode())
    return found


def read_verification(job: Job, model: ModelFolder) -> Verification | None:
    """What was found before, or None."""
    folder, name = _folder(job), f"{verification_key(job, model)}.json"
    return Verification.model_validate_json(folder.read_bytes(name)) if folder.exists(name) else None


def _folder(job: Job) -> Folder:
    return Folder(job.storage) / "verify"


def _device() -> Any:
    """This process's GPU, where there is one."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def _quick_threads(model_path: str) -> Iterator[None]:
    """Every core for models that gain from it; afterwards as many threads as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if weight_bytes(model_path) < SMALL_BYTES else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_checks(context: CheckContext) -> tuple[CheckResult, ...]:
    """All checks on one sample; one that raises has not passed. The last changes the model."""
    return tuple(_run(name, check, context) for name, check in {**CHECKS, BF16: bf16_follows}.items())


def _run(name: str, check: object, context: CheckContext) -> CheckResult:
    began = time.perf_counter()
    broke = False
    try:
        passed, detail = _call(check, context)
    except Exception as error:  # in the model's code or in the check's own
        passed, broke = False, True
        detail = (
            f"the self-test itself failed, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return CheckResult(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - began, error=broke)


def _call(check: object, context: CheckContext) -> Finding:
    assert callable(check)
    finding: Finding = check(context)
    return finding


def require_passed(found: Verification, dtype: str = "bfloat16") -> None:
    """Raises TrainingError where a check failed that matters to a model trained in `dtype`."""
    matter = [check for check in found.checks if check.name != BF16 or dtype == "bfloat16"]
    failed = [check for check in matter if not check.passed]
    if not failed:
        return
    told = "; ".join(f"{check.name}: {check.detail}" for check in failed)
    if all(check.error for check in failed):
        raise TrainingError(
            f"self-tests of task {found.task} with {found.attention} attention could not be run, so nothing is known "
            f"of what they look at: {told}. Please report this; train.verify: false trains without self-tests"
        )
    remedies = ["choose another model.attention"]
    if found.packing and any(check.name in PACKING_CHECKS and not check.error for check in failed):
        remedies.append("or data.packing: false")
    raise TrainingError(
        f"the self-tests of task {found.task} with {found.attention} attention failed, so training would not do "
        f"what it says: {told}. Remedy: {', '.join(remedies)}; train.verify: false trains without self-tests"
    )
