"""Commands in forks of a process that has imported what they need: a plan in 2 s in place of 8, a run with 6 s less."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import rank_context


@dataclass(frozen=True)
class Command:
    """A program at work; what it prints stands in files meanwhile."""

    words: list[str]
    process: Any
    out: Path
    err: Path

    def finish(self, timeout_s: float = 400) -> "subprocess.CompletedProcess[str]":
        """What it printed and how it ended; it is killed where it takes too long."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout_s)
        return subprocess.CompletedProcess(
            self.words, self.process.exitcode, self.out.read_text(), self.err.read_text()
        )


def start_command(
    words: list[str], folder: Path, program: str = "orchestrator.cli", environment: dict[str, str] | None = None
) -> Command:
    """Start a program whose output goes to files of the folder.

    Args:
        program: the module with its `main`; orchestrator.cli is `tuneyard`.
        environment: the whole of it; by default that of this process.
    """
    out, err = folder / "stdout", folder / "stderr"
    variables = dict(os.environ) if environment is None else environment
    process = rank_context().Process(target=_main, args=(program, words, out, err, variables))
    process.start()
    return Command(words, process, out, err)


def run_command(
    words: list[str], folder: Path, program: str = "orchestrator.cli", timeout_s: float = 400, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A program to its end; the variables go into its environment, beside those that are set here."""
    return start_command(words, folder, program, {**os.environ, **variables}).finish(timeout_s)


def _main(program: str, words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if raylet := sys.modules.get("ray._raylet"):  # of the process that this is a fork of: it has read other variables
        raylet.Config.initialize("")
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [program, *words]
    importlib.import_module(program).main()
