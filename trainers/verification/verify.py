"""Runs the checks on a job. Begin at `verify_job`; what is kept of it is `verdict.py`'s."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainers.architecture import attention_of
from trainers.job.schema import Job
from trainers.model.source import ModelFolder
from trainers.model.world import device_name, free_memory, pick_device
from trainers.verification.checks import CHECKS, Check
from trainers.verification.precision import bf16_follows
from trainers.verification.sample import CheckContext, make_context, weight_bytes
from trainers.verification.verdict import (
    BF16,
    CheckResult,
    Verification,
    read_verification,
    verification_key,
    verify_folder,
)

SMALL_BYTES = 20 * 2**20
"""Weights below which several threads only wait for one another."""


def verify_job(job: Job, model: ModelFolder, again: bool = False) -> Verification:
    """Check a job's model on a few of its rows, or read what was found before.

    Args:
        again: check even where a result is kept.

    Raises:
        DataError: where no row can be used.
    """
    device = pick_device(job.scale.gpus_per_worker)
    name = device_name(device)
    if not again and (kept := read_verification(job, model, name)) is not None:
        return kept
    key = verification_key(job, model, name)
    with _quick_threads(model.path), tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        context = make_context(job, model.path, Path(scratch), device)
        attention = attention_of(context.model)
        result = Verification(key=key, task=job.task, attention=attention, packing=job.packing, device=name,
                              checks=run_checks(context), layers=context.layers)  # fmt: skip
        del context
    free_memory()  # a model whose layers keep documents apart refers to itself
    if device.type == "cuda":  # the training's own peak is what counts
        torch.cuda.reset_peak_memory_stats()
    if not any(check.error for check in result.checks):  # what could not be looked at is looked at again
        verify_folder(job).write_bytes(f"{key}.json", result.model_dump_json(indent=1).encode())
    return result


@contextmanager
def _quick_threads(model_path: str) -> Iterator[None]:
    """Every core for models that gain from it; afterwards as many threads as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if weight_bytes(model_path) < SMALL_BYTES else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_checks(context: CheckContext) -> tuple[CheckResult, ...]:
    """All checks on one sample; one that raises has not passed. The last changes the model."""
    return tuple(_run(name, check, context) for name, check in {**CHECKS, BF16: bf16_follows}.items())


def _run(name: str, check: Check, context: CheckContext) -> CheckResult:
    began = time.perf_counter()
    broke = False
    try:
        passed, detail = check(context)
    except Exception as error:  # in the model's code or in the check's own
        passed, broke = False, True
        detail = (
            f"the self-test itself failed, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return CheckResult(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - began, error=broke)
