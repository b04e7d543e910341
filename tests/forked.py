"""The command line in a fork of a process that has imported torch and transformers: a plan in 2 s in place of 8."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import rank_context


def run_command(
    words: list[str], folder: Path, program: str = "orchestrator.cli", timeout_s: float = 400, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What a program prints and how it ends. Its output stands in files of the folder meanwhile.

    Args:
        program: the module with its `main`; orchestrator.cli is `tuneyard`.
        variables: of the environment, beside those that are set here.
    """
    out, err = folder / "stdout", folder / "stderr"
    process = rank_context().Process(target=_main, args=(program, words, out, err, {**os.environ, **variables}))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(words, timeout_s)
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _main(program: str, words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [program, *words]
    importlib.import_module(program).main()
