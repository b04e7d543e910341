"""`tuneyard run` on a tiny job, whole: what the tests of complete runs share.

Starting a run anew takes 15 s of CPU: commands are forks where a process of their own matters, and calls into this
process, with the session's Ray, where it does not.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.tiny import film_rows, load_written, make_bert, tiny_job
from trainers.errors import TuneyardError
from trainers.job.load import load_job
from trainers.model.source import find_model
from trainers.run.events import read_events
from trainers.run.folder import run_folder
from trainers.storage import Folder

PATIENCE_S = 400


def write_job(folder: Path, tokenizer: Path) -> Path:
    """A job file of 24 steps on two workers, with a checkpoint every 6."""
    job = tiny_job(
        folder,
        make_bert(folder / "model", tokenizer, dropout=0.0),
        "classify",
        [row for row in film_rows(240) if "not" not in row["text"]],
        train={"steps": 24, "global_batch_size": 16, "learning_rate": 3e-3},
        scale={"workers": 2},
        checkpoint={"every_steps": 6, "keep": 3},
        report_to=["tensorboard", "mlflow"],
    )
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return path


def own_job(job_file: Path, folder: Path, **data: list[str]) -> Path:
    """The same job with a storage of its own, for which its self-tests are not made again; MLflow does not follow."""
    raw = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    raw |= {"storage": str(folder / "storage"), "data": raw["data"] | data, "train": raw["train"] | {"verify": False}}
    raw["report_to"] = ["tensorboard"]
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def sets(**values: Any) -> list[str]:
    """Words that override values of the job; `__` may stand for the dot of a name."""
    return [word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


def environment(**extra: str) -> dict[str, str]:
    """Without Ray's variables of this process, and with our programs first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | extra


def call(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A program to its end."""
    return subprocess.run(
        words, env=environment(**extra), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def tuneyard(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in this process, which ends as its own process would."""
    done = CliRunner().invoke(app, list(words))
    error = done.exception
    if isinstance(error, TuneyardError):
        return subprocess.CompletedProcess(words, error.exit_code, done.stdout, str(error))
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def answer(*words: str) -> Any:
    """What a command says in JSON."""
    done = tuneyard(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(reached: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Look every 0.02 s; what is waited for has to come while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert alive(), "it ended before it came to what is waited for"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def find_run(job_file: Path, name: str) -> Path:
    """The only run folder of a name."""
    (run,) = runs_of(job_file, name)
    return run


def runs_of(job_file: Path, name: str) -> list[Path]:
    """Its run folder, once it is there."""
    return list((storage_of(job_file) / "runs").glob(f"{name}-????????"))


def storage_of(job_file: Path) -> Path:
    """Where a job that `write_job` or `own_job` wrote keeps everything."""
    return job_file.parent / "storage"


def coming_run(job_file: Path, *overrides: str) -> Path:
    """The run folder that a command on shards that are there will use."""
    job = load_job(job_file, list(overrides))
    model = find_model(job)
    assert model is not None
    shards = load_written(job)
    assert shards is not None
    return run_folder(job, model.digest, shards).path


def put_faults(run: Path, *faults: dict[str, Any]) -> None:
    """Have them happen in the ranks of a run that has not begun."""
    run.mkdir(parents=True)
    (run / "faults.json").write_text(json.dumps(faults))


def events_of(run: Path, kind: str) -> list[Any]:
    """Events of a kind, in order."""
    return [event for event in read_events(Folder(str(run))) if event.kind == kind]


def losses(run: Path) -> dict[int, float]:
    """By step."""
    return {event.step: event.loss for event in events_of(run, "step")}


def starts(run: Path) -> list[int]:
    """The step after which each launch began."""
    return [event.step for event in events_of(run, "start")]


def result_of(run: Path) -> dict[str, Any]:
    """Its result.json."""
    return json.loads((run / "result.json").read_text())


def mlflow_runs(storage: Path, name: str) -> list[Any]:
    """Those of an experiment."""
    from orchestrator.registry.mlflow_client import open_client, registry_uri

    client = open_client(registry_uri(str(storage)))
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []
