"""Records as tables for people; `--json` prints the records themselves."""

from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from orchestrator.commands.doctor import Check
from orchestrator.commands.status import RunStatus, headline
from orchestrator.planning.plan import Plan
from trainers.job.schema import Job
from trainers.run.folder import Evaluation
from trainers.shards.manifest import ShardManifest
from trainers.verification.verify import Verification

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


LABELS = 20
"""Labels that the plan shows."""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], styles: Sequence[str] = ()) -> None:
    """Print one table; missing values are dashes."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for place, row in enumerate(rows):
        table.add_row(*(_text(value) for value in row), style=styles[place] if styles else None)
    Console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plan_table(plan: Plan) -> None:
    """The resolved job, then what it comes to."""
    print(yaml.safe_dump(plan.job, sort_keys=False))
    about = "" if plan.exact else "about "
    batch = f"{plan.world_size} workers x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated"
    rows = [
        (
            "data",
            f"{about}{plan.train_rows:,} rows, {plan.train_tokens:,} tokens, {plan.sequences:,} sequences an epoch",
        ),
        ("global batch", f"{plan.global_batch_size:,} sequences = {batch}"),
        ("steps", f"{about}{plan.steps:,}, {plan.checkpoints:,} checkpoints of {plan.checkpoint_gib:.2f} GiB"),
        *(
            [("labels", ", ".join(plan.labels[:LABELS]) + (" ..." if len(plan.labels) > LABELS else ""))]
            if plan.labels
            else []
        ),
        ("chosen by", f"{plan.mode} {plan.metric}"),
        ("model", f"{plan.parameters:,} parameters"),
        ("memory", f"{plan.state_gib_per_worker:.2f} GiB of state a worker, activations on top"),
        ("host memory", f"{plan.host_gib_per_worker:.2f} GiB a worker for copies of the state"),
        ("run folder", plan.run or "named once the shards are written"),
        *(("note", note) for note in plan.notes),
    ]
    show("plan", ("what", "value"), rows)


def ledger_rows(splits: Sequence[ShardManifest]) -> list[dict[str, Any]]:
    """One record a split: every input row in exactly one outcome."""
    return [
        {
            "split": one.split,
            "key": one.key,
            "rows_in": one.rows_in,
            "outcomes": one.outcomes,
            "sequences": one.total("rows"),
            "tokens": one.total("tokens"),
            "targets": one.total("targets"),
            "tokens_lost": one.total("tokens_lost"),
        }
        for one in splits
    ]


def ledger_table(splits: Sequence[ShardManifest]) -> None:
    """Rows by outcome."""
    rows = [
        (one["split"], outcome, count, count / max(one["rows_in"], 1))
        for one in ledger_rows(splits)
        for outcome, count in one["outcomes"].items()
    ]
    show("ledger: every input row", ("split", "outcome", "rows", "share"), rows)
    for one in ledger_rows(splits):
        print(
            f"{one['split']}: {one['rows_in']:,} rows in, {one['sequences']:,} sequences of {one['tokens']:,} tokens, "
            f"{one['targets']:,} targets, {one['tokens_lost']:,} tokens cut off; shards {one['key']}"
        )


def evaluations_table(job: Job, records: Sequence[Evaluation]) -> None:
    """Metrics by step."""
    names = sorted({name for one in records for name in one.metrics if "/" not in name})
    rows = [(one.step, *(one.metrics.get(name) for name in names), one.error or one.status) for one in records]
    show(f"evaluations of {job.name}", ("step", *names, "state"), rows)


def status_table(found: Sequence[RunStatus]) -> None:
    """One line a run."""
    lines = [headline(one) for one in found]
    show("runs", list(lines[0]) if lines else ("no runs yet",), [list(line.values()) for line in lines])


def verification_table(found: Verification) -> None:
    """One line a self-test."""
    rows = [(one.name, "ok" if one.passed else "fail", one.detail, round(one.seconds, 1)) for one in found.checks]
    title = f"self-tests of task {found.task} with {found.attention} attention, key {found.key}"
    show(title, ("test", "state", "found", "seconds"), rows, [STYLES[row[1]] for row in rows])


def checks_table(checks: Sequence[Check]) -> None:
    """One line a check."""
    rows = [(one.name, one.status, one.value, one.remedy) for one in checks]
    show("doctor", ("check", "state", "value", "remedy"), rows, [STYLES[one.status] for one in checks])
