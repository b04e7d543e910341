"""runs/index.html: every run of a storage on one page, each with a link to its report. Rewritten as runs end."""

from datetime import UTC, datetime
from pathlib import Path

import yaml

from orchestrator.report.html import render_page
from orchestrator.report.table import Table
from trainers.errors import TuneyardError
from trainers.job.load import parse_job
from trainers.run.folder import RESULT, read_result
from trainers.storage import Folder

INDEX = "index.html"
TEMPLATE = Path(__file__).parent / "index.html"
COLUMNS = ("run", "state", "best", "metric", "at step", "steps", "registered", "ended, UTC", "task", "model")
TASK, METRIC, ENDED = (COLUMNS.index(name) for name in ("task", "metric", "ended, UTC"))


def write_index(runs: Folder) -> None:
    """Write the page into the folder that holds the runs, over an earlier one."""
    runs.write_bytes(INDEX, render_page(TEMPLATE, table=index_table(runs)).encode())


def index_table(runs: Folder) -> Table:
    """A line a run that has ended, by task and metric, the newest first; others have no result yet."""
    rows = [row for name in runs.list() if name != INDEX and (row := _row(runs / name))]
    rows.sort(key=lambda row: str(row[ENDED]), reverse=True)
    rows.sort(key=lambda row: (str(row[TASK]), str(row[METRIC])))
    return Table("runs", COLUMNS, rows)


def _row(run: Folder) -> tuple[object, ...] | None:
    try:
        result, job = read_result(run), parse_job(yaml.safe_load(run.read_bytes("job.yaml")))
    except (TuneyardError, ValueError, OSError, yaml.YAMLError):
        return None
    if result is None:
        return None
    best, version = result.best or {}, result.registry
    registered = f"{version.model} v{version.version}{' champion' if version.alias else ''}" if version else None
    model = "/".join(Path(job.model.path).parts[-2:])  # a folder is often called just model
    ended = datetime.fromtimestamp((run.path / RESULT).stat().st_mtime, UTC) if run.is_local else None
    return (run.name, result.status, best.get("value"), best.get("metric"), best.get("step"), result.steps, registered,
            ended.strftime("%Y-%m-%d %H:%M") if ended else None, job.task, model)  # fmt: skip
