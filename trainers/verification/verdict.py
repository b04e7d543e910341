"""What self-tests found, as a record: by what it is kept, and what follows from it. Imports no torch.

The result stands under storage/verify/, keyed by the digest of model, attention backend, task, packing, device and
library versions, so that a launch asks again only after one of them changed.
"""

import hashlib
from importlib.metadata import version

from trainers.errors import TrainingError
from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.records import Record
from trainers.storage import Folder

BF16 = "bf16"
PACKING_CHECKS = ("isolation", "packed_as_separate", "cut_of_step")
"""Checks that can fail because documents share a sequence."""
ATTENTION_CHECKS = (*PACKING_CHECKS, "padding", BF16)
"""Checks that depend on the attention backend."""
VERSION = 5
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
    device: str = "cpu"
    """What it ran on, as `device_name` has it."""
    layers: int | None = None
    """Layers of the model that were looked at; None: all."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)


def verification_key(job: Job, model: ModelFolder, device: str) -> str:
    """What a result depends on. Other devices have other kernels.

    Args:
        device: as `device_name` has it.
    """
    libraries = [version(name) for name in ("torch", "transformers")]
    parts = [VERSION, model.digest, job.model.attention, job.task, job.packing, job.train.objective, device, *libraries]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read_verification(job: Job, model: ModelFolder, device: str) -> Verification | None:
    """What was found before on such a device, or None."""
    folder, name = verify_folder(job), f"{verification_key(job, model, device)}.json"
    return Verification.model_validate_json(folder.read_bytes(name)) if folder.exists(name) else None


def verify_folder(job: Job) -> Folder:
    return Folder(job.storage) / "verify"


def require_passed(found: Verification, dtype: str = "bfloat16") -> None:
    """Raises TrainingError where a check failed that matters to a model trained in `dtype`."""
    matter = [check for check in found.checks if check.name != BF16 or dtype == "bfloat16"]
    failed = [check for check in matter if not check.passed]
    if not failed:
        return
    listed = "; ".join(f"{check.name}: {check.detail}" for check in failed)
    if all(check.error for check in failed):
        raise TrainingError(
            f"self-tests of task {found.task} with {found.attention} attention could not be run, so nothing is known "
            f"of what they look at: {listed}. Please report this; train.verify: false trains without self-tests"
        )
    findings = {check.name for check in failed if not check.error}
    remedies = []
    if findings & {*ATTENTION_CHECKS}:
        remedies.append("choose another model.attention")
    if found.packing and findings & {*PACKING_CHECKS}:
        remedies.append("set data.packing: false")
    if BF16 in findings:
        remedies.append("set model.dtype: float32")
    advice = f"Remedy: {', or '.join(remedies)}" if remedies else "No setting is known to help: please report this"
    raise TrainingError(
        f"the self-tests of task {found.task} with {found.attention} attention failed, so training would not do "
        f"what it says: {listed}. {advice}; train.verify: false trains without self-tests"
    )
