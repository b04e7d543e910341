"""The command line in a fork of a process that has imported torch and transformers: a plan in 2 s in place of 8."""

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import rank_context


def run_command(words: list[str], folder: Path, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """What `tuneyard WORDS` prints and how it ends. Its output stands in files of the folder meanwhile."""
    out, err = folder / "stdout", folder / "stderr"
    process = rank_context().Process(target=_main, args=(words, out, err, dict(os.environ)), daemon=True)
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(words, timeout_s)
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _main(words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["tuneyard", *words]
    from orchestrator.cli import main

    main()
