"""The ledger of a run for people and for programs: counts, rows by reason, the origin of a step's tokens."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from orchestrator.commands.past_run import shards_of
from orchestrator.report.tables import ledger_table
from orchestrator.terminal.table import show, show_table
from trainers.batching.mixture import describe_mixture
from trainers.batching.order import job_order
from trainers.batching.packing import index_packs
from trainers.batching.trace import TracedPiece, trace_step
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.run.record import job_task
from trainers.shards.contamination import Contamination, contamination_name
from trainers.shards.dataset import ShardSet
from trainers.shards.ledger import LedgerLine, ledger_lines
from trainers.shards.manifest import ShardManifest, Shards, shards_folder
from trainers.storage import Folder
from trainers.training.divergence import read_skipped

TABLES = {
    "mixture": "mixture: what an epoch shows",
    "skipped_steps": "rows of steps that were left out because the loss diverged",
    "rows": "rows",
    "step": "tokens of the step",
}
SHOWN = 20
"""Rows in a table; --json gives all."""


def ledger_report(job: Job, run: Folder, reason: str | None, step: int | None) -> dict[str, Any]:
    """Counts of a run's splits and, where asked for, the rows of one outcome or the origins of one step's tokens.

    Raises:
        JobError: where there is no such outcome or step.
    """
    shards = shards_of(job, run)
    report: dict[str, Any] = {"splits": ledger_rows(shards.all), **_beside(job, shards)}
    skipped = read_skipped(run).steps
    report["skipped_steps"] = [
        {"step": one.step + 1, "reason": one.reason, "file": file, "row": row}
        for one in skipped
        for file, row in one.rows
    ]
    if reason is not None:
        report["rows"] = [line.model_dump() for line in rows_of(job, shards, reason)]
        if not report["rows"]:
            known = sorted({name for split in shards.all for name in split.outcomes})
            raise JobError(f"--reason {reason}: no row has that outcome; there are {', '.join(known)}")
    if step is not None:
        report["step"] = [piece.model_dump() for piece in pieces_of(job, shards, step)]
    return report


def rows_of(job: Job, shards: Shards, reason: str) -> Iterator[LedgerLine]:
    """Rows of all splits with an outcome."""
    return chain.from_iterable(ledger_lines(_folder(job, split), split, reason) for split in shards.all)


def pieces_of(job: Job, shards: Shards, step: int) -> list[TracedPiece]:
    """Origins of a step's tokens. Raises JobError where the run has no such step."""
    shard_set = _open(job, shards)
    packs = index_packs(job, shard_set)
    order = job_order(job, len(packs))
    if not 1 <= step <= order.steps:
        raise JobError(f"--step {step}: the run has steps 1 to {order.steps}")
    return list(trace_step(shard_set, packs, order, step))


def print_ledger(report: dict[str, Any], shards_of: list[ShardManifest]) -> None:
    """The report as tables."""
    show_table(ledger_table(shards_of))
    if report["contamination"]:
        print(f"{report['contamination']['rows']:,} training rows say what an evaluation row says")
    for name, title in TABLES.items():
        lines = report.get(name) or []
        if lines:
            show(title, list(lines[0]), [list(line.values()) for line in islice(lines, SHOWN)])
            if len(lines) > SHOWN:
                print(f"... and {len(lines) - SHOWN:,} more (--json prints all)")


def ledger_rows(splits: Sequence[ShardManifest]) -> list[dict[str, Any]]:
    """One record a split: every input row in exactly one outcome."""
    return [
        {
            "split": split.split,
            "key": split.key,
            "rows_in": split.rows_in,
            "outcomes": split.outcomes,
            "sequences": split.total("rows"),
            "tokens": split.total("tokens"),
            "targets": split.total("targets"),
            "tokens_lost": split.total("tokens_lost"),
        }
        for split in splits
    ]


def _beside(job: Job, shards: Shards) -> dict[str, Any]:
    folder, name = _folder(job, shards.train), contamination_name(shards.eval.key)
    found = Contamination.model_validate(folder.read_json(name)) if folder.exists(name) else None
    mixture = describe_mixture(job, shards.train, _open(job, shards).lengths) if shards.train.entries else []
    return {
        "contamination": found.model_dump() if found else None,
        "mixture": [part.model_dump() for part in mixture],
        "tokenizer": shards.train.tokenizer,
        "fallback_reason": shards.train.fallback_reason,
    }


def _folder(job: Job, manifest: ShardManifest) -> Folder:
    return shards_folder(Folder(job.storage), manifest.key)


def _open(job: Job, shards: Shards) -> ShardSet:
    return ShardSet(_folder(job, shards.train), shards.train, job_task(job, shards.train))
