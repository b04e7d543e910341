"""One undisturbed run, made once for all workers of pytest-xdist; whoever needs it first makes it."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.whole_run import call, find_run, runs_of, write_job


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other worker is in a block on this folder."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def job_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """The file of the job that `finished` ran. Only tests/orchestrator/test_run.py writes into its storage."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole-run"
    folder.mkdir(exist_ok=True)
    with alone(folder):
        return folder / "job.yaml" if (folder / "job.yaml").exists() else write_job(folder, tiny_tokenizer)


@pytest.fixture(scope="session")
def finished(job_file: Path) -> Path:
    """The run folder of one undisturbed `tuneyard run`, in a process of its own as a user starts it."""
    with alone(job_file.parent):
        if not any((run / "result.json").exists() for run in runs_of(job_file, "tiny")):
            done = call(sys.executable, "-m", "orchestrator", "run", str(job_file))
            assert done.returncode == 0, done.stdout + done.stderr
            assert "report" in done.stdout
    return find_run(job_file, "tiny")
