"""`tuneyard jobs`: list, logs, stop. Each imports what it needs when it runs, so that --help answers at once."""

import sys
from typing import Annotated

import typer

from orchestrator.commands.options import AsJson, Dashboard, flag, print_json

app = typer.Typer(no_args_is_help=True, help="Jobs that `tuneyard submit` sent to a cluster.")
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id, the start of it, or the job's name.")]


@app.command("list")
def list_command(address: Dashboard, as_json: AsJson = False) -> None:
    """List the jobs that were sent there."""
    from orchestrator.submitting.jobs import COLUMNS, list_jobs
    from orchestrator.submitting.submit import connect
    from orchestrator.terminal.table import show

    found = list_jobs(connect(address))
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
    elif found:
        show("submitted jobs", COLUMNS, [one.row() for one in found])
    else:
        print("no jobs yet")


@app.command()
def logs(
    job: JobId,
    address: Dashboard,
    follow: Annotated[bool, flag("--follow", "-f", help="Go on to its end, and exit as the job does.")] = False,
) -> None:
    """Print what a job has printed."""
    from orchestrator.submitting.jobs import find_job
    from orchestrator.submitting.submit import connect, lost
    from orchestrator.submitting.submit import follow as go_on

    client = connect(address)
    found = find_job(client, job)
    if follow:
        sys.exit(go_on(client, found, address))
    with lost("send the log"):
        print(client.get_job_logs(found), end="")


@app.command()
def stop(job: JobId, address: Dashboard) -> None:
    """Stop a job once its checkpoint is committed; submitting it again goes on from there."""
    from orchestrator.submitting.jobs import find_job, stop_job
    from orchestrator.submitting.submit import connect

    client = connect(address)
    found = find_job(client, job)
    print(f"{found}: {stop_job(client, found)}")
