"""Commands on runs that are there: evaluate, predict, compare, status, ledger, goodput.

Each imports what it needs when it runs, so that --help answers at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.commands.options import Address, AsJson, Overrides, RunName, Storage, complete_run, flag, print_json
from trainers.errors import JobError

app = typer.Typer()


@app.command()
def evaluate(
    run: RunName,
    step: Annotated[int | None, typer.Option(help="One step; 0: the pretrained model. Default: all.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder instead of checkpoints.")] = None,
    overrides: Overrides = None,
    storage: Storage = "runs",
    worst: Annotated[
        int | None,
        typer.Option(min=1, help="Show so many of the costliest rows of the best or given step."),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", help="Put this task of lm-eval, a name or a YAML file, to the best or given step."),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate committed checkpoints again, or a model folder; or show where a checkpoint is most wrong."""
    from rich.console import Console

    from orchestrator.commands.past_run import ask_tasks, evaluate_folder, evaluate_steps, worst_rows
    from orchestrator.terminal.progress import Screen
    from orchestrator.terminal.table import show_evaluations, show_metrics, show_rows
    from trainers.tasks import choose_metric

    job = _job_of(run, storage, overrides)
    screen = Screen(Console(stderr=True, soft_wrap=True, emoji=False))  # stdout is the result's alone
    if worst:
        chosen, views = worst_rows(job, step, worst, address, screen)
        rows = [view.model_dump(exclude=set() if as_json else {"file", "row"}) for view in views]
        print_json(rows) if as_json else show_rows(f"costliest evaluation rows of step {chosen}", rows)
        return
    if model:
        found = evaluate_folder(job, model)
        print_json({"model": str(model), **found}) if as_json else show_metrics(
            str(model), choose_metric(job)[0], found
        )
        return
    if lm_eval:
        tasks = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in lm_eval]
        records = ask_tasks(job, tasks, step, address, screen)
    else:
        records = evaluate_steps(job, step, address, screen)
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
    else:
        show_evaluations(records, choose_metric(job)[0], None, Console(emoji=False))


def _job_of(run: str, storage: str, overrides: Sequence[str] | None) -> Any:
    """The job file itself, which need not have run yet, or the job of a run."""
    from orchestrator.commands.find_run import find_job, job_file_of
    from trainers.job.load import load_job

    job_file = job_file_of(run)
    return load_job(job_file, overrides or ()) if job_file else find_job(run, storage, overrides or ())[0]


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", autocompletion=complete_run, help="A run, an exported folder, or NAME[@VERSION]."
        ),
    ],
    data: Annotated[list[str], typer.Argument(metavar="DATA", help="Files, globs or folders, in any format.")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="A .jsonl or .parquet file; default: print.")] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; default: the best.")] = None,
    overrides: Overrides = None,
    storage: Storage = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow tracking server.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that share the rows; 0: as many as have room.")] = 1,
    address: Address = None,
) -> None:
    """Write what a trained model says to each row of a data set; labels are not needed."""
    from orchestrator.commands.predict import find_model, predict_file

    found = find_model(model, storage, step, uri, list(overrides or ()))
    count = predict_file(found, data, out, workers, address)
    if out:
        print(f"wrote {count:,} predictions to {out}")


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", autocompletion=complete_run, help="A run, an exported folder, or NAME[@VERSION]."
        ),
    ],
    system: Annotated[str | None, typer.Option(help="Text of a system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest.")] = 0.0,
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; default: the best.")] = None,
    storage: Storage = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow tracking server.")] = None,
) -> None:
    """Talk with a trained causal model; an answer ends with the token that training taught."""
    from orchestrator.commands.predict import find_model
    from orchestrator.terminal.chat import talk
    from trainers.evaluation.conversation import Conversation
    from trainers.tasks import load_task

    found = find_model(model, storage, step, uri, [])
    if not load_task(found.job.task).auto_class.endswith("CausalLM"):
        raise JobError(f"{model} was trained for {found.job.task}, which does not talk: `tuneyard predict` asks it")
    code, gpus = found.job.model.trust_remote_code, found.job.scale.gpus_per_worker
    talk(Conversation(found.path, max_new_tokens, temperature, system, code, gpus))


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", autocompletion=complete_run, help="A run, an exported folder, or NAME[@champion]."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; nothing asks who calls.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000,
    step: Annotated[int | None, typer.Option(help="The checkpoint's step; default: the best.")] = None,
    storage: Storage = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow tracking server.")] = None,
) -> None:
    """Answer over HTTP: a causal model as OpenAI's server would, others at /predict; NAME@champion follows it."""
    from orchestrator.commands.serve import serve_model

    serve_model(model, storage, step, uri, host, port)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", autocompletion=complete_run, help="Job files, names of runs or their folders."),
    ],
    storage: Storage = "runs",
    as_json: AsJson = False,
) -> None:
    """Show how runs differ: their jobs, then their metrics with the paired bootstrap's interval."""
    from orchestrator.commands.compare import best_side, show_comparison
    from orchestrator.commands.find_run import find_job
    from orchestrator.registry.comparison import compare_sides

    if len(runs) < 2:
        raise JobError("compare needs two runs or more")
    found = compare_sides([best_side(*find_job(run, storage)) for run in runs])
    print_json(found.model_dump(mode="json")) if as_json else show_comparison(found)


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(autocompletion=complete_run, help="A job file, a run's name or its folder; default: all."),
    ] = None,
    storage: Storage = "runs",
    follow: Annotated[bool, flag(help="Keep showing it until no run is running.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of runs; in a pipe a tab-separated line a run."""
    from orchestrator.commands.status import run_status
    from orchestrator.commands.status_view import show_status
    from trainers.storage import Folder

    if as_json:
        print_json([status.model_dump(mode="json") for status in run_status(Folder(storage), run)])
    else:
        show_status(lambda: run_status(Folder(storage), run), follow)


@app.command()
def gc(
    storage: Storage = "runs",
    older_than_days: Annotated[float, typer.Option(min=0, help="Leave what was used or changed since then.")] = 7.0,
    checkpoints: Annotated[
        bool,
        flag("--checkpoints", help="Also checkpoints of finished runs; the best and newest stay."),
    ] = False,
    yes: Annotated[bool, flag("--yes", help="Delete; without it they are only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what nothing in a storage refers to any more: shards, exports, leftovers; with --yes delete it."""
    from orchestrator.commands.gc import DAY_S, delete, find_garbage, show_garbage

    found = find_garbage(storage, older_than_days * DAY_S, checkpoints)
    stayed = delete(found.garbage) if yes else []
    found = found.model_copy(update={"kept": (*found.kept, *stayed)})
    print_json(found.model_dump(mode="json")) if as_json else show_garbage(found, yes)


@app.command()
def ledger(
    run: RunName,
    reason: Annotated[str | None, typer.Option(help="Show the rows with this outcome, e.g. malformed.")] = None,
    step: Annotated[int | None, typer.Option(help="Show which rows the tokens of this step came from.")] = None,
    storage: Storage = "runs",
    as_json: AsJson = False,
) -> None:
    """Account for every data row of a run."""
    from orchestrator.commands.find_run import find_job
    from orchestrator.commands.ledger import ledger_report, print_ledger
    from orchestrator.commands.past_run import shards_of

    job, folder = find_job(run, storage)
    report = ledger_report(job, folder, reason, step)
    if as_json:
        print_json(report)
        return
    shards = shards_of(job, folder)
    print_ledger(report, shards.all)


@app.command()
def goodput(
    node_mtbf_hours: Annotated[float, typer.Option(min=0.01, help="Mean time between failures of one node, hours.")],
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_run,
            help="A run that the other figures are taken from, where not given.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train together; the ranks of RUN.")] = None,
    save_s: Annotated[float | None, typer.Option(min=0.001, help="Seconds a save holds up the steps.")] = None,
    restart_s: Annotated[float | None, typer.Option(min=0.0, help="Seconds from a failure to the next step.")] = None,
    storage: Storage = "runs",
    as_json: AsJson = False,
) -> None:
    """What failures will cost on a cluster, and how often to save."""
    from orchestrator.commands.find_run import find_folder
    from orchestrator.terminal.table import show
    from trainers.run.events import read_events
    from trainers.run.goodput import Cluster, best_interval_s, forecast, measure

    measured = measure(read_events(find_folder(run, storage))) if run else None
    if nodes is None and measured is None:
        raise JobError("goodput needs --nodes, or a RUN that tells them")
    cluster = Cluster(
        nodes or (measured.world_size if measured else 1),
        node_mtbf_hours,
        save_s or (measured.save_s if measured else 1.0),
        (measured.restart_s if measured else 60.0) if restart_s is None else restart_s,
    )
    rows, interval = forecast(cluster), best_interval_s(cluster)
    if as_json:
        print_json(rows)
        return
    columns = ("seconds between saves", "of the best", "expected", "simulated")
    show(
        "share of useful time, by the seconds between saves",
        columns,
        [
            (
                f"{row['interval_s']:,.0f}",
                f"{row['of_best']:g} times",
                f"{row['expected']:.2%}",
                f"{row['simulated']:.2%}",
            )
            for row in rows
        ],
    )
    steps = f": set checkpoint.every_steps to {max(round(interval / measured.step_s), 1):,}" if measured else ""
    print(f"recommended: a save every {interval:,.0f} s{steps}")
