"""A PostgreSQL server of Debian's packages for a test: in a folder of its own, on loopback, by an unprivileged user."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.training.node_report import free_port

PASSWORD = "postgres-secret"


def program(name: str) -> str:
    """A program of PostgreSQL; the test is skipped where there is none."""
    known = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = str(known[-1]) if known else shutil.which(name)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed (Debian: postgresql)")
    return found


def owner() -> dict[str, int]:
    """PostgreSQL refuses to run as root."""
    if os.getuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


@contextmanager
def postgres() -> Iterator[str]:
    """The address of its database, with its password."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    initdb, control, as_owner = program("initdb"), program("pg_ctl"), owner()
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="tuneyard-postgres-", dir="/tmp"))
    (folder / "password").write_text(PASSWORD)
    if as_owner:
        for path in (folder, folder / "password"):
            os.chown(path, as_owner["user"], as_owner["group"])

    def call(*words: str) -> None:
        done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **as_owner)  # type: ignore[call-overload]
        assert done.returncode == 0, (folder / "log").read_text()

    with (folder / "log").open("w") as log:
        data, words = str(folder / "data"), ["--auth=scram-sha-256", "--username=yard", "--no-sync", "--encoding=UTF8"]
        call(initdb, "-D", data, *words, "--no-locale", f"--pwfile={folder}/password")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        call(control, "-D", data, "-w", "-l", f"{folder}/server.log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://yard:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            call(control, "-D", data, "-m", "immediate", "stop")
            shutil.rmtree(folder)
