"""Whether a job packs: `data.packing: null` means where its architecture keeps documents apart.

That is found out once a model, before anything is planned, and kept under storage/verify/. Imports no torch.
"""

import hashlib
from importlib.metadata import version

from trainers.job.schema import Job
from trainers.job.task_fields import PACKING_TASKS
from trainers.model.source import ModelFolder
from trainers.records import Record
from trainers.storage import Folder

VERSION = 3
"""Of how the decision is made; another one asks again."""


class PackingDecision(Record):
    """Whether documents of a pack are kept apart, and how that is known."""

    schema_version: int = VERSION
    apart: bool
    reason: str
    attention: str | None = None
    """The attention backend that computes each document by itself, where the model works with it."""


def decide_packing(job: Job, model: ModelFolder) -> PackingDecision | None:
    """The decision, made or read; None where the job does not pack."""
    if job.task not in PACKING_TASKS or not job.packing:
        return None
    folder, name = Folder(job.storage) / "verify", f"packing-{_key(job, model)}.json"
    if folder.exists(name):
        return PackingDecision.model_validate_json(folder.read_bytes(name))
    from trainers.verification.pack_probe import ask

    decision = ask(job, model.path)
    folder.write_bytes(name, decision.model_dump_json(indent=1).encode())
    return decision


def with_packing(job: Job, decision: PackingDecision | None) -> Job:
    """The job with packing off where documents would see each other, unless it asks for it, which is refused later; and
    with attention that needs no mask where nothing else is named."""
    if decision is None:
        return job
    if decision.apart:
        attention = decision.attention if job.model.attention == "auto" else None
        return (
            job.model_copy(update={"model": job.model.model_copy(update={"attention": attention})})
            if attention
            else job
        )
    if job.data.packing:
        return job
    return job.model_copy(update={"data": job.data.model_copy(update={"packing": False})})


def _key(job: Job, model: ModelFolder) -> str:
    libraries = [version(name) for name in ("torch", "transformers")]
    return hashlib.sha256(repr([VERSION, model.digest, job.model.attention, *libraries]).encode()).hexdigest()[:16]
