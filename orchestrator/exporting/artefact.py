"""A quantized model is written beside its final name, judged, and only then put there. Begin at `quantize`."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from orchestrator.exporting.verdict import Verdict, judge
from orchestrator.registry.digests import digest_file
from trainers.checkpoint.export import PROVENANCE, Provenance
from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import RESAMPLES
from trainers.evaluation.evaluate import evaluate_model
from trainers.pretrained import weight_files
from trainers.quantization.forms import Quantization
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.tasks import choose_metric
from trainers.tokenizer.gguf_vocabulary import SAMPLED_ROWS

VERDICT = "quantization.json"
REFUSED = ".refused.json"
"""Ending of the file beside the folder's name that holds a verdict against it."""


def quantize(made: Quantization, run: Run, out: Path, share: float) -> Verdict:
    """Write a quantized model, if it is next to as good as the unquantized one; else its verdict alone.

    Args:
        run: whose evaluation rows decide.
        out: the folder to write, which does not exist.
        share: of the metric's value that may be lost.

    Raises:
        EvaluationError: where it cannot be judged; nothing is left then.
    """
    beside = Folder(str(out.absolute().parent))
    with _unfinished(out) as partial:
        verdict = _judged(made, run, partial, share)
        if not verdict.kept:
            beside.write_bytes(out.name + REFUSED, verdict.model_dump_json(indent=1).encode())
            return verdict
        _finish(made, partial, verdict)
        partial.rename(out)
    if beside.exists(out.name + REFUSED):
        beside.delete(out.name + REFUSED)
    return verdict


def _judged(made: Quantization, run: Run, partial: Path, share: float) -> Verdict:
    job, task = made.job, made.task
    metric, mode = choose_metric(job)
    shards = run.open_held(task)[""]
    rows, before = evaluate_model(job, task, str(made.source), shards)
    sample = [shards.row(row).input_ids.tolist() for row in range(min(SAMPLED_ROWS, len(shards.lengths)))]
    notes = made.write(partial, sample)
    rows_after, after = made.score(partial, shards)
    if not np.array_equal(rows, rows_after):
        raise EvaluationError(f"the {made.form} model was scored on other rows than the unquantized one")
    judged = judge(after, before, task, metric, mode, share, job.train.seed)
    return Verdict(
        form=made.form,
        metric=metric,
        better=mode,
        rows=len(rows),
        resamples=RESAMPLES,
        seed=job.train.seed,
        eval_key=run.shards.eval.key,
        model=str(made.source),
        bytes=_weight_bytes(partial),
        unquantized_bytes=_weight_bytes(made.source),
        notes=notes,
        **judged.model_dump(),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (*weight_files(folder), *folder.glob("*.gguf")))


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside the one that is wanted; it goes again where it was not renamed."""
    partial = out.absolute().with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish(made: Quantization, partial: Path, verdict: Verdict) -> None:
    """The verdict and the digests beside the weights, all of it on disk."""
    folder, source = Folder(str(partial)), Folder(str(made.source))
    folder.write_bytes(VERDICT, verdict.model_dump_json(indent=1).encode())
    if source.exists(PROVENANCE):
        known = Provenance.model_validate_json(source.read_bytes(PROVENANCE))
        files = {file: digest_file(folder, file) for file in folder.list()}
        told = known.model_copy(update={"dtype": made.form, "files": files})
        folder.write_bytes(PROVENANCE, told.model_dump_json(indent=1).encode())
    os.sync()
