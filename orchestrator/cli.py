"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from orchestrator.commands.of_runs import app as runs_app
from orchestrator.commands.options import (
    Address,
    AsJson,
    Dashboard,
    Gpu,
    JobPath,
    Overrides,
    Template,
    flag,
    print_json,
)
from orchestrator.commands.registry import app as registry_app
from orchestrator.exporting.command import app as export_app
from orchestrator.submitting.command import app as jobs_app
from trainers.errors import JobError, PlacementError, TuneyardError

PR_SET_NAME = 15
GC_THRESHOLD = 100_000
"""Objects made between two searches for cycles. At Python's 700, a sixth of the time of `plan` went into searching what
torch and transformers make when they are imported."""

app = typer.Typer(
    name="tuneyard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(runs_app)
app.add_typer(export_app)
app.add_typer(registry_app, name="registry")
app.add_typer(jobs_app, name="jobs")


def main() -> None:
    """Run the program; a known failure is one message and its exit code."""
    gc.set_threshold(GC_THRESHOLD)
    if sys.platform == "linux":  # also `python -m orchestrator`, as `submit` starts it, is found by its name
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"tuneyard")
    if not sys.stderr.isatty():  # libraries draw their bars there, which in a file or pipe are a hundred fragments
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except TuneyardError as error:
        _fail(error)


def _fail(error: TuneyardError) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, emoji=False).print(
        f"error: {error}", style="red", highlight=False, markup=False
    )
    sys.exit(error.exit_code)


def _load(path: Path, overrides: Sequence[str] | None) -> Any:
    from trainers.job.load import load_job

    return load_job(path, overrides or ())


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tuneyard {version('tuneyard')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, flag("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Full fine-tuning on your own cluster: from a job file to a registered model, with proof of how it was made."""


@app.command()
def init(
    template: Template,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="Where to write; default: named like the template.")
    ] = None,
) -> None:
    """Write a commented job file and data that it runs with."""
    from orchestrator.commands.init import write_job

    job_file = write_job(template, path)
    print(f"wrote {job_file}; `tuneyard plan {job_file}` checks it, `tuneyard run {job_file}` trains")


@app.command("import")
def import_command(
    path: Annotated[Path, typer.Argument(metavar="YAML", help="A configuration of axolotl or LLaMA-Factory.")],
    out: Annotated[Path, typer.Argument(metavar="JOB", help="The job file to write.")] = Path("job.yaml"),
) -> None:
    """Write a job file from another program's, with a list of what had no counterpart."""
    from orchestrator.importing.command import import_job

    told = import_job(path, out)
    print(f"wrote {out}; `tuneyard plan {out}` checks it" + ("; to look at, or without counterpart:" if told else ""))
    for key, what in told.items():
        print(f"  {key}: {what}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the job file, for editors."""
    from orchestrator.commands.init import job_schema

    print(job_schema(), end="")


@app.command()
def plan(
    job_path: JobPath,
    gpu: Gpu = None,
    memory: Annotated[str | None, typer.Option(help="Plan for GPUs of so much memory, such as 80GiB.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Plan for so many nodes, one worker a GPU.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    throughput: Annotated[float | None, typer.Option(min=1, help="Tokens a second and worker, for the hours.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a worker's hour, for the cost.")] = None,
    overrides: Overrides = None,
    full: Annotated[bool, flag("--full", help="Print the job with every default written out, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything and print what the job will do, without starting a worker."""
    from orchestrator.commands.plan import plan_table
    from orchestrator.planning.hardware import cluster_settings, device_bytes
    from orchestrator.planning.plan import plan_job
    from orchestrator.planning.preflight import check_file

    device, settings = device_bytes(gpu, memory), cluster_settings(gpu, memory, nodes, gpus_per_node)
    checked = check_file(job_path, [*settings, *(overrides or [])], weights=False)
    found = plan_job(checked, device, throughput, price)
    if price is not None and found.cost is None:
        raise JobError("--price: the hours are not known; give --throughput too, the tokens a second of one worker")
    print_json(found.model_dump(mode="json")) if as_json else plan_table(found, full)
    if found.fits is False:
        raise PlacementError(f"the job needs more memory than the {found.device_gib:.1f} GiB of a worker's device")


@app.command()
def show(
    job_path: JobPath,
    row: Annotated[int | None, typer.Option("--row", min=0, help="This row of the split, counted from 0.")] = None,
    number: Annotated[int | None, typer.Option("--random", min=1, help="So many rows, drawn by the seed.")] = None,
    reason: Annotated[
        str | None, typer.Option(help="First rows with this outcome: kept, truncated, dropped, missing_text, ...")
    ] = None,
    pack: Annotated[
        int | None, typer.Option("--pack", min=0, help="This pack of an epoch, as its shards give it, counted from 0.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model gets them: token by token, targets marked, with the borders of packs."""
    from orchestrator.planning.show import examples, print_examples, print_pack, view

    if split not in ("train", "eval"):
        raise JobError(f"--split {split}: there are train and eval")
    if pack is not None:
        shown_pack = view(_load(job_path, overrides)).packs().show(pack)
        print_json(shown_pack.model_dump(mode="json")) if as_json else print_pack(shown_pack)
        return
    rows = examples(_load(job_path, overrides), split, row, number, reason)
    print_json([shown.model_dump(mode="json") for shown in rows]) if as_json else print_examples(rows)


@app.command()
def verify(
    job_path: JobPath,
    again: Annotated[bool, flag(help="Test again, even where an earlier result is kept.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run numerical self-tests on this model, task and attention backend, with the job's own rows."""
    from orchestrator.planning.preflight import check_file
    from orchestrator.terminal.table import show_verification
    from trainers.verification.verdict import require_passed
    from trainers.verification.verify import verify_job

    checked = check_file(job_path, overrides or ())
    found = verify_job(checked.job, checked.model, again)
    print_json(found.model_dump(mode="json")) if as_json else show_verification(found)
    require_passed(found)


@app.command()
def shard(job_path: JobPath, overrides: Overrides = None, address: Address = None) -> None:
    """Run the data stage alone."""
    from orchestrator.planning.preflight import check_file
    from orchestrator.ray_session import ray_session
    from orchestrator.report.tables import ledger_table
    from orchestrator.sharding.stage import is_small, write_shards
    from orchestrator.terminal.progress import Screen
    from orchestrator.terminal.table import show_table

    checked, screen = check_file(job_path, overrides or ()), Screen()
    with nullcontext() if is_small(checked.splits) else ray_session(address), screen.live():
        shards = write_shards(checked, screen.on_shards)
    show_table(ledger_table(shards.all))


@app.command()
def run(
    job_path: JobPath,
    overrides: Overrides = None,
    address: Address = None,
    profile: Annotated[bool, flag("--profile", help="Tell what takes a step's time, with a trace.")] = False,
) -> None:
    """Run the whole job: shard, train, evaluate, select, register. Goes on where an earlier run of it stopped."""
    from orchestrator.run import run_job
    from orchestrator.terminal.progress import Screen

    screen = Screen()
    also = ["train.profile=true"] if profile else []
    screen.results(*run_job(job_path, [*(overrides or ()), *also], address, screen))


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(metavar="JOB|SWEEP", help="Job file, or a sweep file (job:, space:).")],
    grids: Annotated[
        list[str] | None,
        typer.Option("--set-grid", metavar="section.key=v1,v2", help="Values of a field; several give a grid."),
    ] = None,
    halving: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Successive halving: the best 1/N goes on at each pause.")
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Train a job with several values of its fields and register the best. Goes on where it was stopped."""
    from rich.console import Console

    from orchestrator.report.page import REPORT
    from orchestrator.sweep.page import ERROR_CHARS, line_table, trial_table
    from orchestrator.sweep.spec import read_spec
    from orchestrator.sweep.sweep import run_sweep
    from orchestrator.terminal.progress import Screen
    from orchestrator.terminal.table import show_table

    screen = Screen(Console(stderr=True, soft_wrap=True, emoji=False) if as_json else None)
    folder, record = run_sweep(read_spec(path, grids or (), halving), overrides or (), address, screen)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    show_table(trial_table(record, ERROR_CHARS))
    if line := line_table(record):
        show_table(line)
    screen.registered(record.registry)
    screen.say(f"report  {folder}/{REPORT}")


@app.command()
def submit(
    job_path: JobPath,
    address: Dashboard,
    overrides: Overrides = None,
    detach: Annotated[bool, flag("--detach", help="Send it, say how to follow and stop it, and end.")] = False,
) -> None:
    """Run the job on a cluster through Ray Jobs and follow its log; exits as the job does."""
    from orchestrator.submitting.submit import submit as send

    sys.exit(send(job_path, list(overrides or ()), address, detach))


@app.command()
def doctor(
    storage: Annotated[str, typer.Option(help="Storage folder to look at.")] = ".",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, CPU, memory, disk, GPUs, network, Ray."""
    from orchestrator.commands.doctor import check_machine, checks_table

    checks = check_machine(storage, address)
    print_json([one.model_dump(mode="json") for one in checks]) if as_json else checks_table(checks)
    if any(check.status == "fail" for check in checks):
        raise JobError("some checks failed, see above")
